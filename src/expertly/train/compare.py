"""Compare two runs: at which step and which second does each reach a loss?

A run's curve is its held-out loss over all domains at each evaluation, against optimizer steps and
against training seconds (evaluation and saving excluded). Between evaluations it is interpolated
linearly; before the first and after the last nothing is guessed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expertly.errors import ExpertlyError
from expertly.receipts import RECEIPT, read
from expertly.watch.records import METRICS, read_records


class Curve(NamedTuple):
    """A run's held-out loss over time; all lists have one entry per evaluation."""

    name: str
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    tokens: list[int]
    domains: dict[str, float]  # at the last evaluation

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.tokens[-1] / max(self.seconds[-1], 1e-9)


class Reached(NamedTuple):
    """When a run first had a loss."""

    step: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Race:
    """Both runs on the way to one loss; a ratio above 1 means that run A was there sooner."""

    loss: float
    a: Reached | None  # None: it never got there
    b: Reached | None

    @property
    def step_ratio(self) -> float | None:
        """B's steps divided by A's."""
        return self.b.step / self.a.step if self.a and self.b and self.a.step else None

    @property
    def time_ratio(self) -> float | None:
        """B's seconds divided by A's."""
        return self.b.seconds / self.a.seconds if self.a and self.b and self.a.seconds else None


def compare(a: Path, b: Path, *, loss: float | None = None) -> tuple[Curve, Curve, list[Race]]:
    """The curves of two run folders, and their race to `loss`, or to each other's final loss.

    Raises E301 for a folder without evaluations, E102 when neither run reaches `loss`.
    """
    first, second = read_curve(a), read_curve(b)
    if first.name == second.name:
        first, second = first._replace(name=str(a)), second._replace(name=str(b))
    goals = [second.losses[-1], first.losses[-1]] if loss is None else [loss]
    races = [
        Race(loss=goal, a=reached(first, goal), b=reached(second, goal))
        for goal in dict.fromkeys(goals)
    ]
    if all(race.a is None and race.b is None for race in races):
        best = min(first.losses + second.losses)
        why = f"neither run reaches it; the best is {best:.4f}"
        raise ExpertlyError("E102", f"loss {races[0].loss}", why, fix="ask for a higher loss")
    return first, second, races


def read_curve(run: Path) -> Curve:
    """The evaluations that a run wrote down. Raises E301 when there is none."""
    records = [record for record in read_records(run / METRICS) if "eval" in record]
    if not records:
        fix = "name the output_dir of a training run"
        raise ExpertlyError("E301", str(run / METRICS), "no evaluation in it", fix=fix)
    return Curve(
        name=run.name,
        steps=[record["step"] for record in records],
        seconds=[record["seconds"] for record in records],
        losses=[record["eval"]["loss"] for record in records],
        tokens=[record["tokens"] for record in records],
        domains=records[-1]["eval"]["domain"],
    )


def differences_of(a: Path, b: Path) -> list[str]:
    """What makes two runs hard to compare, in plain words, one difference a string.

    Domains and tokens per step are read from the curves, the rest from the receipts where both
    runs have one. Raises E301 for a folder without evaluations and for a damaged receipt.
    """
    first, second = read_curve(a), read_curve(b)
    found = list(_unlike("held-out domains", sorted(first.domains), sorted(second.domains)))
    found += _unlike("tokens per step", _tokens_per_step(first), _tokens_per_step(second))
    if all((run / RECEIPT).is_file() for run in (a, b)):
        found += _unlike_inputs(read(a).inputs, read(b).inputs)
    return found


def _unlike_inputs(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """What two receipts' inputs say; an older receipt may lack some of it, which says nothing."""
    for what, path in (
        ("held-out text or tokenizer", ("held_out", "sha256")),
        ("training text or tokenizer", ("data", "tokens")),
    ):
        ours, theirs = _inner(a, path) or {}, _inner(b, path) or {}
        changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        if changed:
            yield f"other {what} in {', '.join(changed)}"
    for what, path in (
        ("data.eval_tokens", ("held_out", "eval_tokens")),
        ("data.sequence_length", ("data", "sequence_length")),
        ("devices, so their seconds differ", ("machine", "device")),
        ("numbers of threads, so their seconds differ", ("machine", "threads")),
    ):
        yield from _unlike(what, _inner(a, path), _inner(b, path))


def _inner(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _unlike(what: str, a: Any, b: Any) -> Iterator[str]:
    """One line when both are known and differ."""
    if a is not None and b is not None and a != b:
        yield f"other {what}: {_told(a)} against {_told(b)}"


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _tokens_per_step(curve: Curve) -> int | None:
    """None for a run that has not stepped yet."""
    return curve.tokens[-1] // curve.steps[-1] if curve.steps[-1] else None


def reached(curve: Curve, loss: float) -> Reached | None:
    """The first point of a curve at or below `loss`, interpolated between evaluations."""
    if curve.losses[0] <= loss:
        return Reached(curve.steps[0], curve.seconds[0])
    for i in range(1, len(curve.losses)):
        before, now = curve.losses[i - 1], curve.losses[i]
        if now <= loss:
            part = (before - loss) / (before - now)
            return Reached(
                curve.steps[i - 1] + part * (curve.steps[i] - curve.steps[i - 1]),
                curve.seconds[i - 1] + part * (curve.seconds[i] - curve.seconds[i - 1]),
            )
    return None


def chart(curves: list[Curve], *, width: int = 72, height: int = 16) -> str:
    """The losses against training seconds as text, one mark per curve; where they meet, the first.

    The top is cut at the loss after a tenth of the time, so that the part that matters is seen.
    """
    end = max(curve.seconds[-1] for curve in curves)
    low = min(min(curve.losses) for curve in curves)
    high = max(at(curve, end / 10) for curve in curves)
    rows = [[" "] * width for _ in range(height)]
    marked = list(zip("●○◆◇", curves, strict=False))
    for mark, curve in reversed(marked):
        for column in range(width):
            second = end * column / (width - 1)
            loss = at(curve, second)
            if curve.seconds[0] <= second <= curve.seconds[-1] and loss <= high:
                row = round((high - loss) / max(high - low, 1e-9) * (height - 1))
                rows[row][column] = mark
    lines = [f"{_tick(i, height, low, high)}┤{''.join(row)}" for i, row in enumerate(rows)]
    names = "   ".join(f"{mark} {curve.name}" for mark, curve in marked)
    axis = f"{'0':<{width // 2}}{f'{end:.0f} s of training':>{width - width // 2}}"
    return "\n".join(
        [f"       held-out loss   {names}", *lines, f"       └{'─' * width}", f"        {axis}"]
    )


def at(curve: Curve, second: float) -> float:
    """The curve's loss at a moment, interpolated; beyond its ends the loss there."""
    return float(np.interp(second, curve.seconds, curve.losses))


def _tick(row: int, height: int, low: float, high: float) -> str:
    if row % 5 and row != height - 1:
        return " " * 7
    return f"{high - (high - low) * row / (height - 1):6.3f} "
