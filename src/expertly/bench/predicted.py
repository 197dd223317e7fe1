"""The plan's own prediction for a device made of what this machine does, beside what was timed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from expertly.bench.expected import Expected
from expertly.bench.machine import Machine
from expertly.bench.measured import Part, Phase, error
from expertly.bench.steps import REST
from expertly.plan.hardware import Device, device_of
from expertly.plan.shape import PARTS, Shape
from expertly.plan.speed import Step, decode, prefill


class Load(NamedTuple):
    """A phase as it is run. batch 0: a prefill; else decode of so many sequences."""

    batch: int
    prompt: int  # tokens of each sequence
    new: int

    @property
    def step(self) -> int:
        """Which of Times' and Where's fields is this phase's."""
        return 1 if self.batch else 0

    @property
    def tokens(self) -> int:
        """That a step handles."""
        return self.batch or self.prompt


class Timed(NamedTuple):
    """Seconds of a phase; of the model, and when its matrices are nothing.

    rates: FLOP/s of packed kernels, by format and part.
    """

    load: Load
    steps: list[float]
    parts: Mapping[str, float]
    nothing: list[float]
    calls: Mapping[str, float]
    rates: Mapping[str, float]


def as_device(machine: Machine, rates: Mapping[str, float] | None = None) -> Device:
    """What was measured, as a device that a plan can be made for."""
    plain = dict.fromkeys(("fp32", "bf16"), machine.flops)  # the rate of the model's own format
    return replace(
        device_of("cpu"),
        name="this machine",
        memory=machine.free,
        bandwidth=machine.bandwidth,
        flops={**plain, **(rates or {})},
        watts=None,
        source="measured",
    )


def predict(expected: Expected, device: Device, load: Load, overhead: float) -> Step:
    """One step by the plan. overhead: seconds per layer."""
    shape, formats = expected.shape, expected.precision
    kv_bits = formats["norms"].bits  # those of the model's own dtype
    if not load.batch:
        return prefill(
            shape, formats, device, tokens=load.prompt, kv_bits=kv_bits, overhead=overhead
        )
    context = load.prompt + load.new // 2
    return decode(
        shape,
        formats,
        device,
        batch=load.batch,
        context=context,
        kv_bits=kv_bits,
        overhead=overhead,
    )


def phase_of(timed: Timed, expected: Expected, machine: Machine) -> Phase:
    """One phase beside its prediction.

    The roofline is the machine's alone; what is predicted knows the rates of the packed kernels.
    """
    shape, load, nothing = expected.shape, timed.load, min(timed.nothing)
    overhead = nothing / len(shape.layers)
    step = predict(expected, as_device(machine, timed.rates), load, overhead)
    roofline = predict(expected, as_device(machine), load, 0.0)
    best = step.tokens / min(timed.steps)
    least, own = _by_module(shape, roofline), _by_module(shape, step)
    return Phase(
        predicted=step.tokens_per_second,
        best=best,
        median=step.tokens / median(timed.steps),
        error=error(step.tokens_per_second, best),
        roofline=roofline.tokens_per_second,
        overhead=overhead,
        parts=tuple(_parts(least, own, nothing, timed)),
        rates=dict(timed.rates),
    )


def _by_module(shape: Shape, step: Step) -> dict[str, float]:
    """Seconds by part without overhead, under the names of the modules that they are spent in."""
    by_part = dict(step.by_part)
    by_part.pop("overhead", None)
    by_part["attention"] = by_part.get("attention", 0.0) + by_part.pop("kv cache", 0.0)
    if shape.tied:  # the whole table is read by the head
        by_part["head"] = by_part.get("head", 0.0) + by_part.pop("embeddings", 0.0)
    return by_part


def _parts(
    roofline: Mapping[str, float], own: Mapping[str, float], overhead: float, timed: Timed
) -> Iterator[Part]:
    """Every part that took or should take time. The overhead is shared out as the calls took it.

    own: its seconds at the kernels' own rates.
    """
    share = overhead / sum(timed.calls.values())
    for name in (*PARTS, REST):
        extra, took = share * timed.calls.get(name, 0.0), timed.parts.get(name, 0.0)
        predicted = own.get(name, 0.0) + extra
        if predicted or took:
            yield Part(
                name=name,
                roofline=roofline.get(name, 0.0),
                overhead=extra,
                predicted=predicted,
                measured=took,
                gap=took - predicted,
            )
