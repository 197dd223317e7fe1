"""A plan checked on the machine at hand: memory, speed, and whose part of the gap it is.

The prediction is the plan's own, for a device made of what this machine is measured to give, and
with the overhead per layer of the same forward loop when its matrices are nothing. Packed weights
are predicted with the rates that their kernels reach on such matrices, and the overhead is taken
with as many bytes read in between as the model has to read.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from expertly.bench.expected import BATCH, GROUP, Expected, expect, packing_of, weight_bytes
from expertly.bench.machine import (
    DTYPES,
    Machine,
    better,
    free_memory,
    measure_machine,
    resident_memory,
)
from expertly.bench.measured import Growth, Measurement, Run, blame, busy, error
from expertly.bench.packed_model import packed_model, tiny_maker
from expertly.bench.packed_rates import Tokens, attention_rate, faster, packed_rates
from expertly.bench.predicted import Load, Timed, phase_of
from expertly.bench.random_model import meta_model, random_model, tiny_model
from expertly.bench.steps import time_parts, time_steps
from expertly.bench.sweep import Sweep, swept
from expertly.models.experts import register_experts
from expertly.models.lean import decodes_in_one_call
from expertly.models.loading import Model, open_model
from expertly.models.packing import plan_packing
from expertly.plan.precision import weights
from expertly.plan.shape import Shape

# transformers' own name for the experts implementation that it takes by default
STOCK = "grouped_mm"
_ROOM = 0.85  # of free memory that weights may take: steps and libraries need some
_BUSY = 1.3  # median over best, above which something else runs here

Tell = Callable[[str], None]


def measure(
    target: Path,
    config: dict[str, Any],
    shape: Shape,
    *,
    dtype: str | None = None,
    bits: str | None = None,
    prompt: int | None = None,
    new: int = 32,
    memory: float | None = None,
    tell: Tell = lambda line: None,
) -> Measurement:
    """Open a model here, or make it with random weights, and put figures beside predictions.

    target: what the user named; a folder with weights is opened. config: its config.json. dtype:
    fp32, fp16 or bf16; None: the config's own. bits: 4, 8, 16 or such as 4g64, to pack the weights;
    None: as they are. prompt, new: tokens; None: 128, of packed weights 512. memory: bytes that its
    weights may take at most, and never more than most of what is free. What does not fit is cut
    after its first layers. Raises E208 for another dtype, other bits or less than one token, E402
    when not one layer fits, and what open_model raises.
    """
    free = min(_ROOM * free_memory(), math.inf if memory is None else memory)
    packing = packing_of(bits)
    expected = expect(
        shape, config, dtype=dtype, prompt=prompt, new=new, free=free, packing=packing
    )
    if packing:  # what cannot be packed is known before anything is timed
        plan_packing(meta_model(config, DTYPES[expected.dtype]), packing)
    whole = len(expected.shape.layers) == len(shape.layers)
    opened = whole and _has_weights(target, config)
    tell("overhead: the same loop when its matrices are nothing")
    tiny = _tiny(config, expected)
    tell("machine: memory bandwidth, matrix products")
    machine = measure_machine(DTYPES[expected.dtype])
    tell("model: its own weights" if opened else "model: random weights")
    model, grown = _loaded(target if opened else None, config, expected, cut=not whole)
    timed = [
        (name, _timed(model, tiny, expected)) for name in _experts(model, tiny, expected, tell)
    ]
    machine = better(machine, measure_machine(DTYPES[expected.dtype]))
    runs = tuple(_run(name, each, expected, machine) for name, each in timed)
    return Measurement(
        name=shape.name,
        opened=opened,
        dtype=expected.dtype,
        bits=packing.bits if packing else None,
        group_size=packing.group_size if packing else None,
        layers=len(expected.shape.layers),
        whole_layers=len(shape.layers),
        prompt=expected.prompt,
        new=new,
        machine=machine,
        memory=grown,
        runs=runs,
        notes=(*_notes(opened, config, runs), *_one_call(model)),
    )


def _has_weights(target: Path, config: Mapping[str, Any]) -> bool:
    """Whether there are weights to open, and in the format that they are to be run in."""
    return any(target.glob("*.safetensors")) and not config.get("quantization_config")


def _tiny(config: dict[str, Any], expected: Expected) -> Model:
    """The model whose matrices are nothing, after its first steps: libraries take memory then."""
    make = tiny_maker(expected.packing) if expected.packing else random_model
    tiny = tiny_model(config, DTYPES[expected.dtype], len(expected.shape.layers), make)
    time_steps(tiny, prompt=expected.prompt, new=1)
    return tiny


def _loaded(
    folder: Path | None, config: dict[str, Any], expected: Expected, *, cut: bool
) -> tuple[Model, Growth]:
    """The model, of a folder or with random weights, and by how much memory grew with it."""
    gc.collect()
    before = resident_memory()
    if folder is not None:
        model = _opened(folder, expected)
    else:
        make = (
            random_model
            if not expected.packing
            else partial(packed_model, precision=expected.packing)
        )
        model = make(config, DTYPES[expected.dtype], len(expected.shape.layers) if cut else None)
    gc.collect()
    grown = resident_memory() - before
    predicted = weight_bytes(expected.shape, expected.precision)
    return model, Growth(predicted=predicted, measured=grown, error=error(predicted, grown))


def _opened(folder: Path, expected: Expected) -> Model:
    """A folder's model, none of it in mapped files, so that these are let go.

    For the sake of a few tensors a file would be in memory as a whole, and count, until somebody
    needs the room. What is packed was never in a file.
    """
    dtype, packing = DTYPES[expected.dtype], expected.packing
    if packing is None:
        model = open_model(folder, dtype=dtype)
        mapped = [*model.parameters(), *model.buffers()]
    else:
        group_size = packing.group_size or GROUP
        model = open_model(folder, dtype=dtype, bits=packing.bits, group_size=group_size)
        mapped = [*model.parameters()]
    for tensor in mapped:
        tensor.data = tensor.data.clone()
    return model


def _experts(model: Model, tiny: Model, expected: Expected, tell: Tell) -> Iterator[str | None]:
    """What experts run by, one after the other: as expertly opens a model, then as transformers.

    Packed ones run by ours alone; None: there are none.
    """
    names: tuple[str | None, ...] = (None,)
    if expected.shape.moe_layers:
        names = (register_experts(),) if expected.packing else (register_experts(), STOCK)
    for name in names:
        tell("speed" if name is None else f"speed: experts by {name}")
        if name is not None:
            model.set_experts_implementation(name)
            tiny.set_experts_implementation(name)
        yield name


def _timed(model: Model, tiny: Model, expected: Expected) -> list[Timed]:
    """Prefill and decode; with packed weights also decode of several sequences."""
    prompt, new = expected.prompt, expected.new
    found = _phases(model, tiny, expected, [Load(0, prompt, new), Load(1, prompt, new)])
    if expected.packing:
        several = Load(BATCH, max(1, prompt // BATCH), new)
        found += _phases(model, tiny, expected, [several])
    return found


def _phases(model: Model, tiny: Model, expected: Expected, loads: list[Load]) -> list[Timed]:
    """Phases that are run together, as loads say; the last one is decode."""
    batch, prompt, new = loads[-1]
    asked: dict[str, Any] = {"prompt": prompt, "new": new, "batch": batch}
    touched = weights(expected.shape, expected.precision, batch)
    bytes_by_part = {part: held.touched for part, held in touched.items()}
    sweep = Sweep() if expected.packing else None
    before = [_rates(model, tiny, expected, load, sweep) for load in loads]
    with swept(tiny, sweep, bytes_by_part) if sweep else nullcontext():
        nothing = time_steps(tiny, **asked, clock=sweep)
        calls = time_parts(tiny, **asked, clock=sweep)
    if sweep and decodes_in_one_call(tiny):
        with swept(tiny, sweep, bytes_by_part, whole=True):
            nothing = nothing._replace(decode=time_steps(tiny, **asked, clock=sweep).decode)
    steps, parts = time_steps(model, **asked), time_parts(model, **asked)
    after = [_rates(model, tiny, expected, load, sweep) for load in loads]
    return [
        Timed(
            load=load,
            steps=steps[load.step],
            parts=parts[load.step],
            nothing=nothing[load.step],
            calls=calls[load.step],
            rates=faster(one, other),
        )
        for load, one, other in zip(loads, before, after, strict=True)
    ]


def _rates(
    model: Model, tiny: Model, expected: Expected, load: Load, sweep: Sweep | None
) -> dict[str, float]:
    """What packed weights are multiplied with; none where none are packed."""
    if sweep is None:
        return {}
    layers = expected.shape.layers
    top_k = max(layer.feed_forward.top_k for layer in layers)
    tokens = Tokens(load.tokens, max(load.batch, 1), top_k)
    rates = packed_rates(model, tiny, tokens, expected.precision, sweep)
    if not load.batch:
        rates["bf16 kv cache"] = attention_rate(model, layers[0], load.prompt)
    return rates


def _run(name: str | None, timed: list[Timed], expected: Expected, machine: Machine) -> Run:
    """What was timed beside what is predicted."""
    prefill, decode, *more = (phase_of(each, expected, machine) for each in timed)
    return Run(experts=name, decode=decode, prefill=prefill, batched=more[0] if more else None)


def _notes(opened: bool, config: Mapping[str, Any], runs: tuple[Run, ...]) -> Iterator[str]:
    """What to know about the figures, a line each."""
    if not opened and config.get("quantization_config"):
        yield "its checkpoint is quantised otherwise; measured with random weights"
    for run in runs:
        on = f" with experts by {run.experts}" if run.experts else ""
        for name, phase in run.phases:
            yield f"gap of {name}{on}: {blame(phase)}"
    if any(phase.rates for run in runs for _, phase in run.phases):
        yield "predictions contain the packed kernels' own timings; the roofline is the machine's"
    if (worst := max(busy(run.decode) for run in runs)) > _BUSY:
        yield f"the machine was busy: a median step of decode took {worst:.1f}x the best"


def _one_call(model: Model) -> Iterator[str]:
    if decodes_in_one_call(model):
        yield "decode runs all layers in one call; a clock at each part keeps them apart"
