"""Fine-tune one model with each router policy, all else equal: loss, drift, forgetting.

Example: python benchmarks/finetune_routers.py smollm2-moe tasks.jsonl schedule.max_steps=40
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ARMS = {
    "LoRA, router frozen": ("--router", "frozen"),
    "LoRA, router trainable": ("--router", "trainable"),
    "LoRA, router lora": ("--router", "lora"),
    "all weights, router frozen": ("--method", "full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("overrides", nargs="*", help="key=value, of expertly finetune")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune-routers"))
    parser.add_argument("--only", nargs="*", default=[*ARMS], choices=[*ARMS])
    asked = parser.parse_args()
    print("| | learns | loss on the set | on the base's domains | same experts | changed |")
    print("|---|---|---|---|---|---|")
    for name in asked.only:
        print(row(name, run(name, asked)), flush=True)


def run(name: str, asked: argparse.Namespace) -> dict:
    """What `expertly finetune` says of one arm."""
    folder = asked.output / name.replace(", ", "-").replace(" ", "-")
    command = [sys.executable, "-m", "expertly", "finetune", asked.model, asked.data]
    command += [*asked.overrides, *ARMS[name], "--output", str(folder), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def row(name: str, found: dict) -> str:
    """One line of the table."""
    domains = found["drift"]["domains"]
    own = [domain for domain in domains if not domain.startswith("base:")]
    base = [domain for domain in domains if domain not in own]

    def loss(names: list[str]) -> str:
        before, now = (fmean(found["loss"][name][i] for name in names) for i in (0, 1))
        return f"{before:.3f} to {now:.3f}"

    alike = ", ".join(
        f"{fmean(domains[name]['overlap']):.1%} {'of the set' if name in own else name}"
        for name in domains
    )
    changed = ", ".join(f"{part} {count}" for part, count in found["changed"].items())
    learns = f"{found['learning_parameters'] / 1e6:.1f} M"
    return f"| {name} | {learns} | {loss(own)} | {loss(base)} | {alike} | {changed} |"


if __name__ == "__main__":
    main()
