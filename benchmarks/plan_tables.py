"""What papers and model pages say of MoEs, beside what a plan says of the same models.

Run: python benchmarks/plan_tables.py
Every line names the command whose answer it is (all with --json); the figures come out of that
answer, and nothing is measured. tests/plan/test_plan_tables.py holds each to its margin.
"""

import json
import subprocess
import sys
from functools import cache, reduce
from typing import Any, NamedTuple

from expertly.cli.options import table

EAC = "--dtype fp16 --bits 3,attention=4"
VS = "mixtral-8x7b --vs llama-2-70b"
KV = "deepseek-v2 --vs deepseek-67b --kv-bits 6"


class Line(NamedTuple):
    """One published figure, and where ours lies in the answer to a command, in its unit."""

    what: str
    published: float
    unit: float
    command: str
    key: str
    margin: float = 0.005  # of the published figure, which is rounded


LINES = (
    Line("Mixtral 8x7B, parameters, B", 46.7, 1e9, "mixtral-8x7b", "parameters.total"),
    Line("Mixtral 8x7B, active, B", 12.9, 1e9, "mixtral-8x7b", "parameters.active"),
    Line("Mixtral 8x7B, bf16, GB", 93.41, 1e9, "mixtral-8x7b", "weights_bytes"),
    Line("Llama 2 70B, parameters, B", 69, 1e9, "llama-2-70b", "parameters.total"),
    Line("Llama 2 70B, bf16, GB", 138, 1e9, "llama-2-70b", "weights_bytes"),
    Line("DeepSeek-V3, parameters, B", 671, 1e9, "deepseek-v3", "parameters.total"),
    Line("DeepSeek-V3, active, B", 37, 1e9, "deepseek-v3", "parameters.active", 0.02),
    Line("gpt-oss-120b, parameters, B", 116.83, 1e9, "gpt-oss-120b", "parameters.total"),
    Line("Mixtral, 3.03 bits, GB", 18.98, 1e9, f"mixtral-8x7b {EAC}", "weights_bytes", 0.002),
    Line("Phi-3.5-MoE, fp16, GB", 83.75, 1e9, "phi-3.5-moe", "weights_bytes", 0.002),
    Line("Phi-3.5-MoE, 3.03 bits, GB", 17.08, 1e9, f"phi-3.5-moe {EAC}", "weights_bytes", 0.002),
    Line("DeepSeek-MoE, fp16, GB", 32.75, 1e9, "deepseek-moe-16b", "weights_bytes", 0.002),
    Line(
        "DeepSeek-MoE, 3.03 bits, GB",
        7.19,
        1e9,
        f"deepseek-moe-16b {EAC}",
        "weights_bytes",
        0.002,
    ),
    Line("Qwen1.5-MoE, fp16, GB", 28.63, 1e9, "qwen1.5-moe-a2.7b", "weights_bytes", 0.002),
    Line(
        "Qwen1.5-MoE, 3.03 bits, GB",
        6.69,
        1e9,
        f"qwen1.5-moe-a2.7b {EAC}",
        "weights_bytes",
        0.002,
    ),
    Line("DeepSeek-V2, KV elements a token", 34560, 1, KV, "kv_cache_elements_per_token", 0),
    Line("... against DeepSeek 67B's, %", -82.2, 0.01, KV, "kv_cache_against.elements_saved"),
    Line("... with 6 bits for 16, %", -93.3, 0.01, KV, "kv_cache_against.bytes_saved"),
    Line("Llama 2 70B over Mixtral, 69 / 12.9", 5.35, 1, VS, "decode.rows.0.flops_ratio", 0.01),
    Line("... in bytes, batch 1", 5.35, 1, VS, "decode.rows.0.bytes_ratio", 0.01),
    Line(
        "DeepSeek-V3, training, M USD",
        5.576,
        1e6,
        "deepseek-v3 --train-tokens 14.8T --gpu h800 --gpu-hours 2.788M --price 2",
        "cost.usd",
        1e-9,
    ),
)


def main() -> None:
    rows = [["", "published", "planned", "off"]]
    rows += [
        [line.what, f"{line.published:g}", f"{ours:.5g}", f"{ours / line.published - 1:+.2%}"]
        for line in LINES
        for ours in [planned(line)]
    ]
    commands = ["expertly plan", "", *(line.command for line in LINES)]
    shown = zip(table(rows).splitlines(), commands, strict=True)
    print("\n".join(f"{row}  {command}".rstrip() for row, command in shown))


def planned(line: Line) -> float:
    """Our figure, in the published one's unit."""
    found: Any = reduce(_inside, line.key.split("."), answer(line.command))
    return found / line.unit


@cache
def answer(command: str) -> dict[str, Any]:
    """What `expertly plan COMMAND --json` prints."""
    words = [sys.executable, "-m", "expertly", "plan", *command.split(), "--json"]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def _inside(held: Any, key: str) -> Any:
    return held[int(key)] if isinstance(held, list) else held[key]


if __name__ == "__main__":
    main()
