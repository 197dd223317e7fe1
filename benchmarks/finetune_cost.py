"""What a step of fine-tuning costs: all weights, adapters, adapters on packed experts.

Each contender runs in a process of its own on the same model and tokens, all of them once in each
round, so that a machine whose speed drifts is the same for all. "PEFT" is stock transformers with
PEFT's own arithmetic, which makes a full-size product for every stack of experts. Example:

    python benchmarks/finetune_cost.py smollm2-moe --rounds 3
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from expertly.memory import peak_memory
from expertly.models.adapters import AdapterSpec, add_adapter
from expertly.models.loading import load_weights

RANK = 8
# name: dtype of the weights, bits, whose adapters
CONTENDERS: dict[str, tuple[torch.dtype, int | None, str]] = {
    "all weights, float32": (torch.float32, None, "none"),
    "LoRA by PEFT, bf16": (torch.bfloat16, None, "peft"),
    "LoRA, bf16": (torch.bfloat16, None, "ours"),
    "LoRA, 8 bits": (torch.float32, 8, "ours"),
    "LoRA, 4 bits": (torch.float32, 4, "ours"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="an MoE's folder")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=4, help="timed, after a first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[*CONTENDERS], choices=[*CONTENDERS])
    parser.add_argument("--child", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(cost(asked, *CONTENDERS[asked.child])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked.only}
    for number in range(asked.rounds):
        for name in asked.only:
            found[name].append(run(name))
            print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr)
    show(found, asked)


def run(name: str) -> dict[str, float]:
    """One contender's figures, from a process of its own."""
    command = [sys.executable, *sys.argv, "--child", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cost(asked: argparse.Namespace, dtype: torch.dtype, bits: int | None, by: str) -> dict:
    """Seconds of a step, the most memory in bytes, and how many numbers learn."""
    torch.manual_seed(0)
    model: Any
    if by == "peft":
        model = stock(asked.model, dtype)
    else:
        model = load_weights(asked.model, dtype=dtype, bits=bits)
    if by == "ours":
        add_adapter(
            model, AdapterSpec(r=RANK, lora_alpha=2.0 * RANK, targets=("experts", "attention"))
        )
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    size = (asked.rows, asked.length)
    ids = torch.randint(0, model.config.vocab_size, size)
    seconds = [step(model, optimizer, ids) for _ in range(1 + asked.steps)]
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": peak_memory(),
        "learning": sum(p.numel() for p in learning),
    }


def stock(folder: Path, dtype: torch.dtype) -> Any:
    """Stock transformers with stock PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(model, config)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Forward, backward and update; the seconds that they took."""
    started = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def show(found: dict[str, list[dict[str, float]]], asked: argparse.Namespace) -> None:
    """The table: medians over the rounds, time against the first contender of the same round."""
    first = next(iter(found))
    print(f"{asked.rows} x {asked.length} tokens a step, {torch.get_num_threads()} threads")
    print("| | learns | step | against the first | memory |")
    print("|---|---|---|---|---|")
    for name, rounds in found.items():
        pairs = zip(rounds, found[first], strict=True)
        ratio = statistics.median(one["seconds"] / other["seconds"] for one, other in pairs)
        seconds = statistics.median(one["seconds"] for one in rounds)
        memory = max(one["bytes"] for one in rounds) / 1e9
        learns = rounds[0]["learning"] / 1e6
        print(f"| {name} | {learns:.1f} M | {seconds:.2f} s | {ratio:.2f} x | {memory:.2f} GB |")


if __name__ == "__main__":
    main()
