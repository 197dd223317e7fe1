"""Do the alarms hold? Routers that collapse must raise one soon, healthy ones none, ever.

Run: python benchmarks/collapse.py [collapse | healthy] [--steps 300] [--seed 0]
Tiny models on real text, the demo's config made small. A collapse has one of two causes: no balance
loss and a high router learning rate, or from step 100 a selection bias of +10 for one expert.
Onset: the first of 8 steps on end in which some layer's raw load (before capacity, of that step
alone) is over the collapse limit. Each such run is alarmed, rebalanced as router.on_collapse=
rebalance does it, and goes on beside a control: the same seed with the default balance and rate.
Healthy runs print the worst of each figure, to be held against the limits.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

import expertly.cli
from expertly.config import load
from expertly.models.probe import OutputProbe
from expertly.train.config import TrainConfig
from expertly.train.guard import Guard
from expertly.train.rebalance import Remedy, rebalance
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.alarms import KINDS, WINDOW, Alarms, Changes, collapse
from expertly.watch.recorder import Recorder
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


class Run(NamedTuple):
    """What to train."""

    name: str
    overrides: tuple[str, ...]
    top_k: int
    cause: tuple[str, ...] = ()  # overrides that make it collapse
    bump: bool = False  # or a bias


class Seen(NamedTuple):
    """One step of a run."""

    counts: LayerCounts
    norms: Tensor | None
    changes: Changes
    loss: float  # cross-entropy


def run(family: str, experts: int, top_k: int, seed: int, *more: str, **fields: object) -> Run:
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


def drive(asked: Run, overrides: Sequence[str], steps: int, *, remedied: bool) -> Iterator[Seen]:
    """Train with alarms; remedied: rebalance at each collapse, as the training loop does."""
    given = ["output_dir=unused", *SMALL, *asked.overrides, *overrides]
    config = load(TrainConfig, DEMO, [*given, f"schedule.max_steps={steps}"])
    job = prepare(config, None, lambda line: None)
    assert job.attachment is not None, "these are MoE models"
    layers = job.attachment.layers
    recorder, probe = Recorder(job.attachment.rule), OutputProbe(job.model)
    alarms = Alarms(len(layers), layers[0].num_experts, asked.top_k)
    guard, remedy = Guard(config.optim), Remedy()
    for step in range(steps):
        if asked.bump and remedied and step == BUMP:
            for bias in job.attachment.bias:
                bias[1] += 10
        if step % 10 == 0:
            probe.arm()
        followed = replace(config, router=remedy.router(config.router))
        done = train_step(followed, job, recorder, guard, step)
        norms = probe.read()
        changes = alarms.add(step + 1, done.counts, norms)
        yield Seen(done.counts, norms, changes, done.losses.cross_entropy)
        collapsed = [each.layer for each in changes.raised if each.kind == "collapse"]
        if remedied and collapsed:
            rebalance(job.model, job.attachment, job.optimizer, collapsed)
            remedy = remedy.after(config.optim, collapsed)
            remedy.cap(job.optimizer, job.attachment)
            alarms.reset(collapsed)


def figures(seen: Sequence[Seen], top_k: int, window: int) -> Tensor:
    """The collapse figure of every `window` steps: (steps, layers)."""
    chosen = torch.stack([each.counts.chosen for each in seen])
    return torch.stack([collapse(each.sum(-1), top_k) for each in chosen.unfold(0, window, 1)])


def onset(seen: Sequence[Seen], top_k: int, start: int) -> int | None:
    """The first step of the onset, from 1; None: it never comes."""
    over = (figures(seen, top_k, 1) > KINDS["collapse"].limit).any(dim=-1).tolist()
    return next((s + 1 for s in range(start, len(over) - 7) if all(over[s : s + 8])), None)


def tell_collapse(asked: Run, steps: int) -> None:
    """Print when it was alarmed, and what became of load and loss."""
    seen = list(drive(asked, asked.cause, steps, remedied=True))
    control = list(drive(asked, (), steps, remedied=False))
    alarms = [each for one in seen for each in one.changes.raised if each.kind == "collapse"]
    first = min((each.step for each in alarms), default=None)
    began = onset(seen, asked.top_k, BUMP if asked.bump else 0)
    last = float(figures(seen[-16:], asked.top_k, 16).max())
    loss = fmean(each.loss for each in seen[-20:])
    at_rest = fmean(each.loss for each in control[-20:])
    others = sorted({each.kind for one in seen for each in one.changes.raised} - {"collapse"})
    print(
        f"{asked.name:60} onset {began} alarm {first} times {len({a.step for a in alarms})} "
        f"last {max((a.step for a in alarms), default=None)} end figure {last:.2f} "
        f"loss {loss:.3f} control {at_rest:.3f} {' '.join(others)}",
        flush=True,
    )


def tell_healthy(asked: Run, steps: int) -> None:
    """Print its alarms, and the worst of each figure."""
    seen = list(drive(asked, (), steps, remedied=False))
    stacked = [torch.stack(values) for values in zip(*(each.counts for each in seen), strict=True)]
    counts = LayerCounts._make(stacked)
    lasting = counts.chosen.unfold(0, WINDOW, 1).sum(-1)
    share = float((lasting / lasting.mean(-1, keepdim=True)).min())
    norms = torch.stack([each.norms for each in seen if each.norms is not None])
    norms = norms / norms.nanmedian(dim=-1, keepdim=True).values
    dropped = 1 - counts.load.unfold(0, WINDOW, 1).sum((-1, -2)) / lasting.sum(-1)
    certain = (counts.confidence / counts.tokens.unsqueeze(-1)).unfold(0, 16, 1).mean(-1)
    raised = [f"{a.kind}@{a.step}" for each in seen for a in each.changes.raised]
    print(
        f"{asked.name:60} collapse {figures(seen, asked.top_k, 16).max():.2f} dead {share:.3f} "
        f"silent {norms[~norms.isnan()].min():.2f} overflow {dropped.max():.2f} "
        f"saturation {certain.max():.2f} loss {fmean(each.loss for each in seen[-20:]):.3f} "
        f"alarms {raised}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("collapse", "healthy"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--first", type=int, default=20, help="only that many runs of each")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the limits saw 0")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for what, runs, tell in (
        ("collapse", collapsing(asked.seed), tell_collapse),
        ("healthy", healthy(asked.seed + 100), tell_healthy),
    ):
        if asked.what in (None, what):
            print(what, {name: kind.limit for name, kind in KINDS.items()})
            for each in islice(runs, asked.first):
                tell(each, asked.steps)


if __name__ == "__main__":
    main()
