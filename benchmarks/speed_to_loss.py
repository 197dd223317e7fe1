"""Does an MoE reach its dense twin's final held-out loss in fewer steps, and in fewer seconds?

Run: python benchmarks/speed_to_loss.py [key=value ...] [--seeds 0 1 2] [--lengths 0.5 1 2]
     python benchmarks/speed_to_loss.py --gpu
Both have the same schedule, so where the MoE meets its twin's last loss its own learning rate has
not come down yet. On a CPU the two run side by side, each on half of the cores, so that a machine
whose speed drifts slows both; on a GPU they take turns. Stopped, the same command goes on.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from expertly.cli.options import number, print_json, table
from expertly.config import load
from expertly.folders import checkpoints
from expertly.models.inspect import inspect_folder
from expertly.train.compare import Curve, chart, compare, reached
from expertly.train.config import TrainConfig
from expertly.train.setup import prepare
from expertly.watch.history import history

CONFIG = Path(__file__).with_suffix(".yaml")
# about 50 million active parameters, 64 experts; steps of 65,536 tokens
GPU = [
    "model.hidden_size=512",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=4",
    "model.num_experts=64",
    "model.num_experts_per_tok=2",
    "model.moe_intermediate_size=1280",
    "data.vocab_size=16384",
    "data.sequence_length=512",
    "schedule.per_device_train_batch_size=128",
    "schedule.bf16=true",
    "schedule.max_steps=1200",
    "optim.learning_rate=1e-3",
    "eval.eval_steps=60",
]


class Lead(NamedTuple):
    """How far ahead of its twin an MoE is: the twin's figure over the MoE's; None: not there."""

    steps: float | None
    seconds: float | None  # of training; evaluation and saving excluded


class Pair(NamedTuple):
    """A finished pair."""

    folder: Path
    seed: int
    moe: Curve
    twin: Curve

    @property
    def tokens(self) -> int:
        """That the twin read; the MoE read the same."""
        return self.twin.tokens[-1]

    def lead(self, evaluation: int = -1) -> Lead:
        """On the way to the loss that the twin had at one of its evaluations."""
        goal = reached(self.moe, self.twin.losses[evaluation])
        if goal is None:
            return Lead(None, None)
        steps, seconds = self.twin.steps[evaluation], self.twin.seconds[evaluation]
        return Lead(steps / goal.step, seconds / goal.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lengths", type=float, nargs="+", default=[1.0], help="of max_steps")
    parser.add_argument("--gpu", action="store_true", help="the large pair, one seed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    if asked.gpu:
        asked.overrides = [*GPU, *asked.overrides]
        asked.seeds = asked.seeds[:1]
    asked.folder = asked.folder or Path(
        "runs/speed_to_loss_gpu" if asked.gpu else "runs/speed_to_loss"
    )
    config = load(TrainConfig, asked.config, [*asked.overrides, "model.twin=true", "device=cpu"])
    prepare(config, None, lambda line: print(line, file=sys.stderr))  # so that tokens are made once
    pairs = [
        race(asked, seed, length, round(length * config.schedule.max_steps))
        for length in sorted(asked.lengths)
        for seed in asked.seeds
    ]
    if asked.json:
        print_json([as_json(pair) for pair in pairs])
    else:
        print(as_text(pairs))


def race(asked: argparse.Namespace, seed: int, length: float, steps: int) -> Pair:
    """Train both of a pair, or go on with them; what is finished is only read."""
    folder = asked.folder / f"seed-{seed}" / f"length-{length:g}"
    given = [*asked.overrides, f"seed={seed}", f"schedule.max_steps={steps}"]
    commands = {"moe": given, "twin": [*given, "model.twin=true"]}
    with ThreadPoolExecutor(max_workers=1 if asked.gpu else 2) as side_by_side:
        jobs = [
            side_by_side.submit(train, asked.config, [*orders, f"output_dir={folder / name}"])
            for name, orders in commands.items()
        ]
        for job in jobs:
            job.result()
    moe, twin, _ = compare(folder / "moe", folder / "twin")
    return Pair(folder, seed, moe, twin)


def train(config: Path, orders: list[str]) -> None:
    """Run `expertly train` to its end, on half of the cores."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    command = [sys.executable, "-m", "expertly", "train", str(config), *orders, "--resume"]
    subprocess.run(
        command,
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def as_text(pairs: list[Pair]) -> str:
    """A row for each pair, the ratios' spread over seeds, the last curves, who its experts are."""
    head = ["twin read", "seed", "twin's loss", "MoE's", "fewer steps", "less time"]
    rows = [[*head, "MoE tok/s", "twin tok/s"]]
    for pair in pairs:
        losses = [f"{pair.twin.losses[-1]:.3f}", f"{pair.moe.losses[-1]:.3f}"]
        ratios = map(times, pair.lead())
        speeds = [f"{curve.tokens_per_second:,.0f}" for curve in (pair.moe, pair.twin)]
        rows.append([number(pair.tokens), str(pair.seed), *losses, *ratios, *speeds])
    last = pairs[-1]
    parts = [table(rows), spread(pairs), along([p for p in pairs if p.tokens == last.tokens])]
    parts += [chart([last.moe, last.twin]), sizes_of(last.folder)]
    domains = history(last.folder / "moe")["domains"]
    shares = ", ".join(f"{share:.2f}" for share in domains["specialisation"])
    parts.append(f"specialisation by domain, layer by layer (0 none, 1 full): {shares}")
    return "\n\n".join(parts)


def as_json(pair: Pair) -> dict[str, Any]:
    """A pair for machines."""
    curves = {"moe": pair.moe._asdict(), "twin": pair.twin._asdict()}
    return {"seed": pair.seed, "tokens": pair.tokens, "lead": pair.lead()._asdict(), **curves}


def spread(pairs: list[Pair]) -> str:
    """Mean, least and most of both ratios over the seeds, by how long the twin trained."""
    rows = [["twin read", "fewer steps", "least", "most", "less time", "least", "most"]]
    for tokens in dict.fromkeys(pair.tokens for pair in pairs):
        same = [pair for pair in pairs if pair.tokens == tokens]
        cells = [number(tokens)]
        for ratios in zip(*(pair.lead() for pair in same), strict=True):
            known = [ratio for ratio in ratios if ratio is not None]
            whole = len(known) == len(ratios)
            seen = (mean(known), min(known), max(known)) if whole else (None, None, None)
            cells += map(times, seen)
        rows.append(cells)
    return table(rows)


def along(pairs: list[Pair]) -> str:
    """The mean lead against tokens: to the losses that the twins had on their way."""
    rows = [["twin had read", "its loss", "fewer steps", "less time"]]
    count = len(pairs[0].twin.steps)
    for evaluation in range(1, count, max(1, count // 10)):
        leads = [pair.lead(evaluation) for pair in pairs]
        if any(lead.steps is None for lead in leads):
            continue
        loss = mean(pair.twin.losses[evaluation] for pair in pairs)
        ratios = [times(mean(each)) for each in zip(*leads, strict=True)]
        rows.append([number(pairs[0].twin.tokens[evaluation]), f"{loss:.3f}", *ratios])
    return table(rows)


def times(ratio: float | None) -> str:
    """1.31x; a dash where the MoE never had its twin's loss."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def sizes_of(folder: Path) -> str:
    """Parameters of both, total and used by one token."""
    seen = {name: inspect_folder(checkpoints(folder / name)[-1]) for name in ("moe", "twin")}
    said = [f"{name} {number(s.total)}, {number(s.active)} active" for name, s in seen.items()]
    return f"parameters: {'; '.join(said)}"


if __name__ == "__main__":
    main()
