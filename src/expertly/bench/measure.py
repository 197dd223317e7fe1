"""A plan checked on the machine at hand: memory, speed, and whose part of the gap it is.

The prediction is the plan's own, for a device made of what this machine is measured to give, and
with the overhead per layer of the same forward loop when its matrices are nothing.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from expertly.bench.machine import (
    DTYPES,
    Machine,
    better,
    free_memory,
    measure_machine,
    resident_memory,
)
from expertly.bench.measured import Growth, Measurement, Part, Phase, Run, blame, busy, error
from expertly.bench.random_model import random_model, tiny_model
from expertly.bench.steps import REST, WARM_UP, Times, Where, time_parts, time_steps
from expertly.errors import ExpertlyError
from expertly.families import decoder as decoder_of
from expertly.memory import size
from expertly.models.experts import register_experts
from expertly.models.loading import Model, open_model
from expertly.plan.hardware import Device, device_of
from expertly.plan.precision import Precision, precision, weights
from expertly.plan.shape import PARTS, Shape
from expertly.plan.speed import Step, decode, prefill

# transformers' own name for the experts implementation that it takes by default
STOCK = "grouped_mm"
_ROOM = 0.85  # of free memory that weights may take: steps and libraries need some
_BUSY = 1.3  # median over best, above which something else runs here
_SPELT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

Tell = Callable[[str], None]


class _Expected(NamedTuple):
    """What a prediction needs: the layers that are measured, and how."""

    shape: Shape
    precision: Precision
    dtype: str
    prompt: int
    new: int


class _Timed(NamedTuple):
    """Seconds with one experts implementation; of the model, and when its matrices are nothing."""

    experts: str | None
    steps: Times
    parts: Where
    nothing: Times
    calls: Where


def measure(
    target: Path,
    config: dict[str, Any],
    shape: Shape,
    *,
    dtype: str | None = None,
    prompt: int = 128,
    new: int = 32,
    memory: float | None = None,
    tell: Tell = lambda line: None,
) -> Measurement:
    """Open a model here, or make it with random weights, and put figures beside predictions.

    target: what the user named; a folder with weights is opened. config: its config.json. dtype:
    fp32, fp16 or bf16; None: the config's own. prompt, new: tokens. memory: bytes that its weights
    may take at most, and never more than most of what is free. What does not fit is cut after its
    first layers. Raises E208 for another dtype or less than one token, E402 when not one layer
    fits, and what open_model raises.
    """
    free = min(_ROOM * free_memory(), math.inf if memory is None else memory)
    expected = _expected(shape, dtype or _said_dtype(config), prompt, new, free)
    whole = len(expected.shape.layers) == len(shape.layers)
    opened = whole and _has_weights(target, config)
    tell("overhead: the same loop when its matrices are nothing")
    tiny = tiny_model(config, DTYPES[expected.dtype], len(expected.shape.layers))
    time_steps(tiny, prompt=expected.prompt, new=1)  # libraries take memory at their first use
    tell("machine: memory bandwidth, matrix products")
    machine = measure_machine(DTYPES[expected.dtype])
    tell("model: its own weights" if opened else "model: random weights")
    model, grown = _loaded(target if opened else None, config, expected, cut=not whole)
    timed = _timed(model, tiny, expected, tell)
    machine = better(machine, measure_machine(DTYPES[expected.dtype]))
    runs = tuple(_run(each, expected, as_device(machine)) for each in timed)
    return Measurement(
        name=shape.name,
        opened=opened,
        dtype=expected.dtype,
        layers=len(expected.shape.layers),
        whole_layers=len(shape.layers),
        prompt=expected.prompt,
        new=new,
        machine=machine,
        memory=grown,
        runs=runs,
        notes=tuple(_notes(opened, config, runs)),
    )


def first_layers(shape: Shape, formats: Precision, free: float) -> Shape:
    """A shape, or as many of its first layers as have room in so many bytes.

    Raises E402 when there is none for a single one.
    """
    for count in range(len(shape.layers), 0, -1):
        cut = replace(shape, layers=shape.layers[:count])
        need = _weight_bytes(cut, formats)
        if need <= free:
            return cut
    why = f"one layer and its ends take {size(need)}, and {size(free)} may be taken"
    raise ExpertlyError("E402", shape.name, why, fix="measure a smaller model")


def _expected(shape: Shape, dtype: str, prompt: int, new: int, free: float) -> _Expected:
    """What is measured, with words and numbers checked."""
    dtype = _SPELT.get(dtype, dtype)
    if dtype not in DTYPES:
        why = f"{dtype!r} is nothing that a model can be run in here"
        raise ExpertlyError("E208", "--dtype", why, fix=f"choose one of {', '.join(DTYPES)}")
    if min(prompt, new) < 1:
        why = f"a prompt of {prompt} tokens and {new} new ones"
        raise ExpertlyError("E208", "--measure", why, fix="ask for at least one of each")
    if shape.context:
        prompt = max(1, min(prompt, shape.context - new - WARM_UP))
    formats = precision(shape, dtype)
    return _Expected(first_layers(shape, formats, free), formats, dtype, prompt, new)


def _said_dtype(config: Mapping[str, Any]) -> str:
    """What a config.json says, where a model can be run in it; bf16 otherwise."""
    said = (
        part.get(key) for part in (config, decoder_of(config)) for key in ("dtype", "torch_dtype")
    )
    return next((_SPELT[str(name)] for name in said if str(name) in _SPELT), "bf16")


def _has_weights(target: Path, config: Mapping[str, Any]) -> bool:
    """Whether there are weights to open, and in the format that they are to be run in."""
    return any(target.glob("*.safetensors")) and not config.get("quantization_config")


def _weight_bytes(shape: Shape, formats: Precision) -> float:
    return sum(held.resident for held in weights(shape, formats).values())


def _loaded(
    folder: Path | None, config: dict[str, Any], expected: _Expected, *, cut: bool
) -> tuple[Model, Growth]:
    """The model, of a folder or with random weights, and by how much memory grew with it."""
    dtype, layers = DTYPES[expected.dtype], len(expected.shape.layers)
    gc.collect()
    before = resident_memory()
    if folder is not None:
        model = open_model(folder, dtype=dtype)
        _leave_files(model)
    else:
        model = random_model(config, dtype, layers if cut else None)
    gc.collect()
    grown = resident_memory() - before
    predicted = _weight_bytes(expected.shape, expected.precision)
    return model, Growth(predicted=predicted, measured=grown, error=error(predicted, grown))


def _leave_files(model: Model) -> None:
    """Copy every tensor once, so that none lies in a mapped file and the files are let go.

    For the sake of a few tensors a file would be in memory as a whole, and count, until somebody
    needs the room.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _timed(model: Model, tiny: Model, expected: _Expected, tell: Tell) -> list[_Timed]:
    """The model as expertly opens it, then with transformers' own experts implementation."""
    experts: tuple[str | None, ...] = (None,)
    if expected.shape.moe_layers:
        experts = (register_experts(), STOCK)
    timed = []
    for name in experts:
        tell("speed" if name is None else f"speed: experts by {name}")
        if name is not None:
            model.set_experts_implementation(name)
            tiny.set_experts_implementation(name)
        tokens = {"prompt": expected.prompt, "new": expected.new}
        nothing = time_steps(tiny, **tokens), time_parts(tiny, **tokens)
        timed.append(
            _Timed(name, time_steps(model, **tokens), time_parts(model, **tokens), *nothing)
        )
    return timed


def _run(timed: _Timed, expected: _Expected, device: Device) -> Run:
    """What was timed beside what is predicted."""
    shape, formats, prompt = expected.shape, expected.precision, expected.prompt
    context = prompt + expected.new // 2
    return Run(
        experts=timed.experts,
        decode=_phase(shape, partial(decode, shape, formats, device, context=context), timed, 1),
        prefill=_phase(shape, partial(prefill, shape, formats, device, tokens=prompt), timed, 0),
    )


def as_device(machine: Machine) -> Device:
    """What was measured, as a device that a plan can be made for."""
    return replace(
        device_of("cpu"),
        name="this machine",
        memory=machine.free,
        bandwidth=machine.bandwidth,
        flops=dict.fromkeys(("fp32", "bf16"), machine.flops),  # the rate of the model's own format
        watts=None,
        source="measured",
    )


def _phase(shape: Shape, predict: Callable[..., Step], timed: _Timed, which: int) -> Phase:
    """One phase beside its prediction. which: 0 prefill, 1 decode."""
    times, nothing = timed.steps[which], min(timed.nothing[which])
    overhead = nothing / len(shape.layers)
    step = predict(overhead=overhead)
    best = step.tokens / min(times)
    parts = _parts(_roofline(shape, step), nothing, timed.parts[which], timed.calls[which])
    return Phase(
        predicted=step.tokens_per_second,
        best=best,
        median=step.tokens / median(times),
        error=error(step.tokens_per_second, best),
        roofline=predict(overhead=0.0).tokens_per_second,
        overhead=overhead,
        parts=tuple(parts),
    )


def _roofline(shape: Shape, step: Step) -> dict[str, float]:
    """Seconds by part, under the names of the modules that they are spent in."""
    by_part = dict(step.by_part)
    by_part.pop("overhead", None)
    by_part["attention"] = by_part.get("attention", 0.0) + by_part.pop("kv cache", 0.0)
    if shape.tied:  # the whole table is read by the head
        by_part["head"] = by_part.get("head", 0.0) + by_part.pop("embeddings", 0.0)
    return by_part


def _parts(
    roofline: Mapping[str, float],
    overhead: float,
    measured: Mapping[str, float],
    calls: Mapping[str, float],
) -> Iterator[Part]:
    """Every part that took or should take time. The overhead is shared out as `calls` took it."""
    share = overhead / sum(calls.values())
    for name in (*PARTS, REST):
        least, extra = roofline.get(name, 0.0), share * calls.get(name, 0.0)
        took = measured.get(name, 0.0)
        if least or extra or took:
            yield Part(
                name=name,
                roofline=least,
                overhead=extra,
                predicted=least + extra,
                measured=took,
                gap=took - least - extra,
            )


def _notes(opened: bool, config: Mapping[str, Any], runs: tuple[Run, ...]) -> Iterator[str]:
    """What to know about the figures, a line each."""
    if not opened and config.get("quantization_config"):
        yield "its checkpoint is quantised; measured with random weights that are not"
    for run in runs:
        on = f" with experts by {run.experts}" if run.experts else ""
        yield f"gap of decode{on}: {blame(run.decode)}"
        yield f"gap of prefill{on}: {blame(run.prefill)}"
    if (worst := max(busy(run.decode) for run in runs)) > _BUSY:
        yield f"the machine was busy: a median step of decode took {worst:.1f}x the best"
