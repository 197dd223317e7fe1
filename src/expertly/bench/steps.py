"""Time a model's own forward loop, and where in it the time goes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertly.errors import ExpertlyError
from expertly.models.inspect import part_of
from expertly.models.layers import moe_layers
from expertly.models.loading import Model

REST = "rest"  # Python and the framework, between the parts
_PREFILLS = 4
WARM_UP = 3  # steps before those that count
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward

Clock = Callable[[], float]  # seconds since whenever


class Times(NamedTuple):
    """Seconds of each prefill and of each decode step."""

    prefill: list[float]
    decode: list[float]


class Where(NamedTuple):
    """Seconds of a typical prefill and of a typical decode step, by part and REST."""

    prefill: dict[str, float]
    decode: dict[str, float]


@torch.inference_mode()
def time_steps(
    model: Model, *, prompt: int, new: int, batch: int = 1, clock: Clock | None = None
) -> Times:
    """Prefills of `prompt` random tokens, and `new` decode steps after the last, with a KV cache.

    batch: sequences; prefills are timed of one alone. Tokens are random in decode too, so that no
    expert is asked again and again. clock: seconds, in place of the usual one's.
    """
    clock = clock or time.perf_counter
    ids = _random_ids(model, prompt + new + WARM_UP, batch)
    if batch > 1:
        return Times([], _steps(model, ids, prompt, clock)[WARM_UP:])
    _steps(model, ids[:, : prompt + WARM_UP], prompt, clock)  # kernels are made at the first call
    work = partial(_prefill, model, ids[:, :prompt])
    prefills = [_timed(work, clock)[0] for _ in range(_PREFILLS)]
    return Times(prefills, _steps(model, ids, prompt, clock)[WARM_UP:])


@torch.inference_mode()
def time_parts(
    model: Model, *, prompt: int, new: int, batch: int = 1, clock: Clock | None = None
) -> Where:
    """As time_steps, with a clock at the door of every part; the parts and REST fill the step."""
    clock = clock or time.perf_counter
    ids = _random_ids(model, prompt + new, batch)
    with _clocks(model, clock) as clocks:
        work = partial(_prefill, model, ids[:, :prompt])
        prefills = [_split(clocks, work, clock) for _ in range(_PREFILLS if batch == 1 else 1)]
        cache = _prefill(model, ids[:, :prompt]).past_key_values
        steps = [
            _split(clocks, partial(_decode, model, token, cache), clock)
            for token in ids[:, prompt:].split(1, dim=1)
        ]
    return Where(typical(prefills), typical(steps))


def typical(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of the fastest quarter of some steps: parts still add up to a step.

    What slows the others down is not the model: the machine does something else, too.
    """
    fastest = sorted(steps, key=lambda step: sum(step.values()))[: max(1, len(steps) // 4)]
    return {part: fmean(step[part] for step in fastest) for part in fastest[0]}


def parted(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """The modules that make up a model, with the part that each is of; none is inside another.

    What they leave out has no weights of its own, or several parts' together.
    """
    known: dict[int, str] = {}
    with suppress(ExpertlyError):  # a dense model
        for layer in moe_layers(model):
            known |= {id(layer.router): "router", id(layer.experts): "experts"}
    yield from _parted("", model, known)


def _parted(name: str, module: nn.Module, known: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    part = known.get(id(module)) or _part(name, module)
    if part and not isinstance(module, _CONTAINERS):
        yield part, module
        return
    for child, inside in module.named_children():
        yield from _parted(f"{name}.{child}" if name else child, inside, known)


def _part(name: str, module: nn.Module) -> str | None:
    """The part that all of a module belongs to; norms inside an attention are the attention's."""
    parts = {part_of(f"{name}.{inner}") for inner in module.state_dict()}  # packed weights, too
    if len(parts) == 1:
        return parts.pop()
    own = part_of(f"{name}.weight")
    return own if parts == {own, "norms"} else None


@contextmanager
def _clocks(model: Model, clock: Clock) -> Iterator[dict[str, float]]:
    """Seconds by part, counted up while the model runs."""
    seconds: dict[str, float] = {part: 0.0 for part, _ in parted(model)}
    started: dict[int, float] = {}

    def start(module: nn.Module, args: tuple) -> None:
        started[id(module)] = clock()

    def stop(part: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            seconds[part] += clock() - started[id(module)]

        return hook

    handles = []
    for part, module in parted(model):
        handles.append(module.register_forward_pre_hook(start))
        handles.append(module.register_forward_hook(stop(part)))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _split(clocks: dict[str, float], work: Callable[[], object], clock: Clock) -> dict[str, float]:
    """Seconds by part of one piece of work, and what is left of it."""
    clocks.update(dict.fromkeys(clocks, 0.0))
    seconds, _ = _timed(work, clock)
    return {**clocks, REST: seconds - sum(clocks.values())}


def _timed(work: Callable[[], Any], clock: Clock) -> tuple[float, Any]:
    started = clock()
    answer = work()
    return clock() - started, answer


def _steps(model: Model, ids: Tensor, prompt: int, clock: Clock) -> list[float]:
    """Seconds of each decode step, one per token after the prompt."""
    cache = _prefill(model, ids[:, :prompt]).past_key_values
    tokens = ids[:, prompt:].split(1, dim=1)
    return [_timed(partial(_decode, model, token, cache), clock)[0] for token in tokens]


def _prefill(model: Model, ids: Tensor) -> Any:
    """All tokens at once; the head looks at the last alone, as in generate()."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _decode(model: Model, token: Tensor, cache: Any) -> int:
    out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return int(out.logits[0, -1].float().argmax())  # reading it waits for the step's end


def _random_ids(model: Model, count: int, batch: int) -> Tensor:
    table: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(table.weight), (batch, count), generator=generator)
