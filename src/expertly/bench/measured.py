"""What was measured beside what was predicted, as records and as the rows of tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from expertly.bench.expected import BATCH
from expertly.bench.machine import Machine
from expertly.memory import size


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a step, in seconds. gap: measured - predicted.

    roofline: what the machine's memory and products allow. predicted: that and the overhead; of
    packed weights the kernels' own time in place of the roofline. overhead: of its Python and its
    calls, as the same model has it with matrices that are nothing.
    """

    name: str
    roofline: float
    overhead: float
    predicted: float
    measured: float
    gap: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Prefill or decode, in tokens per second. overhead: seconds per layer.

    error: in % of the best, above 0 where too much was predicted. What is predicted follows from
    the best that the machine does, so it is held against the best step: the median tells how busy
    the machine was besides. The parts are of other steps, which a clock at each of them slows a
    little.
    """

    predicted: float
    median: float
    best: float
    error: float
    roofline: float  # of the machine alone: no overhead, no kernel's own rate
    overhead: float
    parts: tuple[Part, ...]
    rates: dict[str, float]  # FLOP/s of packed kernels at its tokens, by format and part


@dataclass(frozen=True, kw_only=True)
class Run:
    """The model with one of transformers' experts implementations; None: it has no experts.

    batched: decode of several sequences, of packed weights.
    """

    experts: str | None
    decode: Phase
    prefill: Phase
    batched: Phase | None = None

    @property
    def phases(self) -> list[tuple[str, Phase]]:
        """Those that were measured, with names for people."""
        batched = [(f"decode of {BATCH}", self.batched)] if self.batched else []
        return [("decode", self.decode), *batched, ("prefill", self.prefill)]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Bytes by which memory grew when the model came, and those of its weights. error: in %."""

    predicted: float
    measured: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A model on this machine, beside its plan. The first run is what expertly opens by default."""

    name: str
    opened: bool  # from its folder; else its weights are random
    dtype: str
    bits: int | None  # that its weights were packed to, and
    group_size: int | None  # in what groups; 0 at 16 bits
    layers: int  # its first ones, that were measured, of whole_layers
    whole_layers: int
    prompt: int
    new: int
    machine: Machine
    memory: Growth
    runs: tuple[Run, ...]
    notes: tuple[str, ...]


class Table(NamedTuple):
    """For the terminal: the first row is the head."""

    title: str
    rows: list[list[str]]


def error(predicted: float, measured: float) -> float:
    """By how many % the prediction is off what was measured."""
    return 100 * (predicted / measured - 1) if measured else 0.0


def tables(found: Measurement) -> list[Table]:
    """A measurement for people: the machine, figures beside predictions, and where the gap is."""
    gaps = (
        Table(f"Where a step of {name} goes{_on(run)}", _gap_rows(phase))
        for run in found.runs
        for name, phase in run.phases
    )
    return [
        Table("This machine", _machine_rows(found)),
        Table(_what(found), _figure_rows(found)),
        *gaps,
    ]


def blame(phase: Phase) -> str:
    """Whose the gap is, in a few words: the parts that are slower than predicted, worst first."""
    late = sorted((part for part in phase.parts if part.gap > 0), key=lambda part: -part.gap)
    whole = sum(part.gap for part in late)
    if not whole:
        return "no part is slower than predicted"
    return ", ".join(f"{part.name} {part.gap / whole:.0%}" for part in late[:3])


def _what(found: Measurement) -> str:
    weights = "" if found.opened else ", random weights"
    cut = "" if found.layers == found.whole_layers else f" of {found.whole_layers}"
    groups = f" in groups of {found.group_size}" if found.group_size else ""
    packed = f", packed to {found.bits} bits{groups}" if found.bits else ""
    return f"{found.name} in {found.dtype}{packed}, {found.layers}{cut} layers{weights}"


def _on(run: Run) -> str:
    return f", experts by {run.experts}" if run.experts else ""


def _machine_rows(found: Measurement) -> list[list[str]]:
    machine = found.machine
    rows = [
        ["", "measured"],
        ["memory, read", f"{machine.bandwidth / 1e9:.1f} GB/s"],
        [f"matrix product, {found.dtype}", f"{machine.flops / 1e9:,.0f} GFLOP/s"],
        ["threads", str(machine.threads)],
        ["memory, free", size(machine.free)],
    ]
    for run in found.runs:
        for name, phase in run.phases:
            overhead = f"{phase.overhead * 1e3:.2f} ms"
            rows.append([f"overhead of a layer, {name}{_on(run)}", overhead])
            rows += [[f"{key}, {name}", _rate(rate)] for key, rate in phase.rates.items()]
    return rows


def _rate(flops: float) -> str:
    return f"{flops / 1e9:,.0f} GOP/s"


def _figure_rows(found: Measurement) -> list[list[str]]:
    memory = found.memory
    grown = [size(memory.predicted), size(memory.measured), "", f"{memory.error:+.1f} %", ""]
    return [
        ["", "predicted", "measured", "median", "error", "roofline"],
        ["memory of its weights", *grown],
        *chain.from_iterable(_speed_rows(run) for run in found.runs),
    ]


def _speed_rows(run: Run) -> Iterator[list[str]]:
    for name, phase in run.phases:
        speeds = [f"{speed:,.1f}" for speed in (phase.predicted, phase.best, phase.median)]
        yield [
            f"{name}, tokens/s{_on(run)}",
            *speeds,
            f"{phase.error:+.0f} %",
            f"{phase.roofline:,.1f}",
        ]


def _gap_rows(phase: Phase) -> list[list[str]]:
    rows = [["part", "roofline ms", "overhead ms", "predicted ms", "measured ms", "gap ms"]]
    for part in phase.parts:
        times = (part.roofline, part.overhead, part.predicted, part.measured)
        rows.append([part.name, *(_ms(time) for time in times), f"{part.gap * 1e3:+.2f}"])
    rows.append(["total", *_totals(phase.parts)])
    return rows


def busy(phase: Phase) -> float:
    """How many times longer the median step took than the best."""
    return phase.best / phase.median


def _totals(parts: Sequence[Part]) -> list[str]:
    names = ("roofline", "overhead", "predicted", "measured")
    gap = sum(part.gap for part in parts)
    totals = (_ms(sum(getattr(part, name) for part in parts)) for name in names)
    return [*totals, f"{gap * 1e3:+.2f}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
