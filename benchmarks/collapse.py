"""Do the alarms hold? Routers that collapse must raise one soon and recover; healthy ones none.

Run: python benchmarks/collapse.py [collapse | healthy] [--steps 300] [--seed 0]
Tiny models on real text, the demo's config made small. A collapse has one of two causes: no balance
loss and a high router learning rate, or from step 100 a selection bias of +10 for one expert.
Onset: the first of 8 steps on end in which some layer's raw load (before capacity, of that step
alone) is over the collapse limit. Such a run trains with router.on_collapse=rebalance beside a
control: the same seed with the default balance and rate. Healthy runs print the worst of each
figure, to be held against the limits.
Exits with 1 when a collapse is not alarmed within 50 steps of its onset or does not recover (at the
end the collapse figure is above the one that clears the alarm, or the loss of the last 20 steps is
over 5 % above the control's), or when a healthy run raises any alarm.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

import expertly.cli
from expertly.config import load
from expertly.errors import ExpertlyError
from expertly.train.config import TrainConfig
from expertly.train.guard import Guard
from expertly.train.health import Health
from expertly.train.rebalance import Remedy
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.alarms import WINDOW, collapse
from expertly.watch.kinds import KINDS
from expertly.watch.stats import LayerCounts

DEMO = Path(expertly.cli.__file__).with_name("demo.yaml")
SMALL = (
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.moe_intermediate_size=64",
    "data.sequence_length=64",
    "data.eval_tokens=512",
    "schedule.per_device_train_batch_size=8",
)
FAMILIES = {
    "qwen3_moe": (),
    "mixtral": ("model.extra={}",),
    "olmoe": ("model.extra={}",),
    "deepseek_v3": (
        "model.num_hidden_layers=3",  # the first is dense
        "model.num_key_value_heads=4",
        "model.num_shared_experts=1",
        "model.intermediate_size=128",
        "model.extra={q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, "
        "qk_rope_head_dim: 8, v_head_dim: 8}",
    ),
}
NO_BALANCE = ("router.router_aux_loss_coef=0", "router.router_z_loss_coef=0")
BUMP = 100  # the step of the bias
SOON = 50  # steps from the onset to the alarm at most
NEAR = 1.05  # of the control's loss


class Run(NamedTuple):
    """What to train."""

    name: str
    overrides: tuple[str, ...]
    top_k: int
    cause: tuple[str, ...] = ()  # overrides that make it collapse
    bump: bool = False  # or a bias


class Seen(NamedTuple):
    """One step of a run that the guard let pass."""

    step: int  # from 1
    counts: LayerCounts
    norms: Tensor | None  # the last known
    loss: float  # cross-entropy
    alarms: list[dict[str, Any]]  # raised
    error: str  # why the run ended here; empty: it did not


class Ledger:
    """In place of a run's log: keeps the alarms."""

    def __init__(self) -> None:
        self.alarms: list[dict[str, Any]] = []

    def metrics(self, record: dict[str, Any]) -> None:
        """Keep an alarm."""
        if "alarm" in record:
            self.alarms.append(record["alarm"])

    def say(self, line: str) -> None:
        """Say nothing."""


def run(family: str, experts: int, top_k: int, seed: int, *more: str, **fields: Any) -> Run:
    """One run's overrides, on top of the demo's config."""
    sizes = (f"model.num_experts={experts}", f"model.num_experts_per_tok={top_k}")
    overrides = (f"model.family={family}", *FAMILIES[family], *sizes, f"seed={seed}", *more)
    name = " ".join((family, f"{top_k}/{experts}", *(each.split(".")[-1] for each in more)))
    return Run(name, overrides, top_k, **fields)


def collapsing(first_seed: int) -> Iterator[Run]:
    """20 runs that collapse."""
    seeds, families = count(first_seed), list(FAMILIES)
    sizes = [(16, 2), (8, 2), (4, 2), (8, 1), (16, 4), (32, 4), (64, 8)]
    for index, (experts, top_k) in enumerate(sizes):
        for turn, rate in enumerate((0.03, 0.2)):
            cause = (*NO_BALANCE, f"optim.router_learning_rate={rate}")
            family = families[(index + turn) % 4]
            yield run(family, experts, top_k, next(seeds), cause=cause)
    own, soft, sigmoid = "", "biased_softmax_topk", "biased_sigmoid_topk"
    for family, experts, top_k, rule in (
        ("deepseek_v3", 16, 2, own),
        ("qwen3_moe", 8, 2, soft),
        ("mixtral", 8, 1, sigmoid),
        ("qwen3_moe", 64, 8, soft),
        ("olmoe", 4, 2, sigmoid),
        ("deepseek_v3", 16, 4, own),
    ):
        more = (f"router.router={rule}", "router.allow_non_stock=true") if rule else ()
        yield run(family, experts, top_k, next(seeds), *more, bump=True)


def healthy(first_seed: int) -> Iterator[Run]:
    """20 runs that do not."""
    sizes = [(16, 2), (8, 2), (4, 2), (8, 1), (16, 4), (32, 4), (4, 1), (64, 8), (4, 3)]
    variants = [
        (),
        ("optim.learning_rate=1e-3",),
        ("optim.learning_rate=3e-4",),
        ("router.capacity_factor=1.25", "router.allow_non_stock=true"),
        ("router.router_aux_loss_coef=0.02",),
    ]
    for index in range(20):
        family = list(FAMILIES)[index % 4]
        more = variants[(index + index // 4) % 5]
        if family == "deepseek_v3":
            more = (*more, "router.bias_update_rate=0.001")
        yield run(family, *sizes[(index * 2 + index // 9) % 9], first_seed + index, *more)


def drive(asked: Run, overrides: Sequence[str], steps: int, on_collapse: str) -> Iterator[Seen]:
    """Train as the training loop does; with on_collapse=rebalance a bias may make it collapse."""
    given = ["output_dir=unused", *SMALL, *asked.overrides, *overrides]
    given += [f"schedule.max_steps={steps}", f"router.on_collapse={on_collapse}"]
    config = load(TrainConfig, DEMO, given)
    job = prepare(config, None, lambda line: None)
    assert job.attachment is not None, "these are MoE models"
    health, guard = Health(job, config, Remedy()), Guard(config.optim)
    for step in range(steps):
        if asked.bump and on_collapse == "rebalance" and step == BUMP:
            for bias in job.attachment.bias:
                assert bias is not None, "these routers have one"
                bias[1] += 10
        health.look(step)
        followed = replace(config, router=health.remedy.router(config.router))
        done = train_step(followed, job, health.recorder, guard, step)
        if done.bad is not None:  # it moved nothing, and nobody heeds it
            continue
        log: Any = Ledger()
        error = ""
        assert done.counts is not None, "these are MoE models"
        try:
            if health.heed(step + 1, done.counts, log):
                guard.forget()
        except ExpertlyError as ended:
            error = ended.code
        loss = done.losses.cross_entropy
        yield Seen(step + 1, done.counts, health.alarms.norms, loss, log.alarms, error)
        if error:
            return


def figures(seen: Sequence[Seen], top_k: int, window: int) -> Tensor:
    """The collapse figure of every `window` steps: (steps, layers)."""
    chosen = torch.stack([each.counts.chosen for each in seen])
    return torch.stack([collapse(each.sum(-1), top_k) for each in chosen.unfold(0, window, 1)])


def onset(seen: Sequence[Seen], top_k: int, start: int) -> int | None:
    """The first step of the onset; None: it never comes."""
    over = (figures(seen, top_k, 1) > KINDS["collapse"].limit).any(dim=-1).tolist()
    begins = (i for i in range(len(over) - 7) if seen[i].step > start and all(over[i : i + 8]))
    return next((seen[i].step for i in begins), None)


def tell_collapse(asked: Run, steps: int) -> bool:
    """Print when it was alarmed, and what became of load and loss; whether all is as it must be."""
    seen = list(drive(asked, asked.cause, steps, "rebalance"))
    control = list(drive(asked, (), steps, "warn"))
    raised = [alarm for one in seen for alarm in one.alarms]
    alarmed = [alarm["step"] for alarm in raised if alarm["kind"] == "collapse"]
    began = onset(seen, asked.top_k, BUMP if asked.bump else 0)
    last = float(figures(seen[-16:], asked.top_k, 16).max())
    loss, rest = (fmean(each.loss for each in run[-20:]) for run in (seen, control))
    problems = [seen[-1].error] if seen[-1].error else []
    if not alarmed or (began is not None and alarmed[0] > began + SOON):
        problems.append("not alarmed in time")
    if last > KINDS["collapse"].clear or loss > NEAR * rest:
        problems.append("not recovered")
    print(
        f"{asked.name:60} onset {began} alarm {min(alarmed, default=None)} "
        f"times {len(set(alarmed))} last {max(alarmed, default=None)} refused {steps - len(seen)} "
        f"end figure {last:.2f} loss {loss:.3f} control {rest:.3f} "
        f"{' '.join(sorted({alarm['kind'] for alarm in raised} - {'collapse'}))} "
        f"{'FAILED: ' + ', '.join(problems) if problems else 'ok'}",
        flush=True,
    )
    return not problems


def tell_healthy(asked: Run, steps: int) -> bool:
    """Print its alarms, and the worst of each figure; whether there was no alarm."""
    seen = list(drive(asked, (), steps, "warn"))
    stacked = [torch.stack(values) for values in zip(*(each.counts for each in seen), strict=True)]
    counts = LayerCounts._make(stacked)
    window = min(WINDOW, len(seen))
    lasting = counts.chosen.unfold(0, window, 1).sum(-1)
    share = float((lasting / lasting.mean(-1, keepdim=True)).min())
    norms = torch.stack([each.norms for each in seen if each.norms is not None])
    norms = norms / norms.nanmedian(dim=-1, keepdim=True).values
    dropped = 1 - counts.load.unfold(0, window, 1).sum((-1, -2)) / lasting.sum(-1)
    certain = (counts.confidence / counts.tokens).unfold(0, 16, 1).mean(-1)
    raised = [f"{alarm['kind']}@{alarm['step']}" for each in seen for alarm in each.alarms]
    print(
        f"{asked.name:60} collapse {figures(seen, asked.top_k, 16).max():.2f} dead {share:.3f} "
        f"silent {norms[~norms.isnan()].min():.2f} overflow {dropped.max():.2f} "
        f"saturation {certain.max():.2f} loss {fmean(each.loss for each in seen[-20:]):.3f} "
        f"{f'FAILED: {raised}' if raised else 'ok'}",
        flush=True,
    )
    return not raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("collapse", "healthy"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--first", type=int, default=20, help="only that many runs of each")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the limits saw 0")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    well = []
    for what, runs, tell in (
        ("collapse", collapsing(asked.seed), tell_collapse),
        ("healthy", healthy(asked.seed + 100), tell_healthy),
    ):
        if asked.what in (None, what):
            print(what, {name: kind.limit for name, kind in KINDS.items()})
            for each in islice(runs, asked.first):
                well.append(tell(each, asked.steps))
    print(f"{sum(well)} of {len(well)} runs are as they must be")
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
