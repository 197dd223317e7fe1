"""What a run writes down of a step and of an evaluation; the formats are in docs/train.md."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from expertly.train.checkpoint import Progress
from expertly.train.evaluate import HeldOut
from expertly.train.log import RunLog
from expertly.train.update import Step
from expertly.watch.snapshots import shares, snapshot


def write_step(
    log: RunLog, at: Progress, window: Progress, done: Step, norms: Tensor | None
) -> None:
    """The last step's numbers. window: where the report before it stood; norms: (layers, experts)
    of the experts' outputs, NaN where unknown."""
    speed = (at.tokens - window.tokens) / max(at.seconds - window.seconds, 1e-9)
    train = {
        "loss": done.loss,
        **done.losses._asdict(),
        "grad_norm": done.grad_norm,
        "learning_rate": done.learning_rate,
        "tokens_per_second": speed,
    }
    if done.counts is None:
        log.metrics({**_where(at), "train": train})
        return
    log.metrics({**_where(at), "train": train, "moe": done.health})
    log.router({**_where(at), **snapshot(done.counts, norms)})


def write_evaluation(
    log: RunLog, at: Progress, held_out: HeldOut, cosines: Mapping[str, Sequence[float]]
) -> None:
    """Held-out losses, which experts each domain's tokens went to, and how alike experts are.

    cosines: per layer, to the dense model and to each other; empty for a dense model.
    """
    said = {"eval": {"loss": held_out.loss, "domain": held_out.domains}}
    alike = {"divergence": {name: fmean(rows) for name, rows in cosines.items()}}
    log.metrics({**_where(at), **said, **(alike if cosines else {})})
    if held_out.loads:
        loads = {name: shares(load) for name, load in held_out.loads.items()}
        rows = {"divergence": dict(cosines)} if cosines else {}
        log.router({**_where(at), "domains": loads, **rows})


def status(done: Step, at: Progress) -> str:
    """One step in one line for people."""
    speed = at.tokens / max(at.seconds, 1e-9)
    line = f"loss {done.losses.cross_entropy:.3f}  {speed:,.0f} tok/s"
    if done.health is None:
        return line
    dead, hottest = done.health["dead_frac"], done.health["max_load_ratio"]
    return f"{line}  load max {hottest:.1f}x  dead {dead:.0%}"


def _where(at: Progress) -> dict[str, Any]:
    return {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
