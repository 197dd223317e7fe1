"""How fast the packed kernels multiply a model's own weights, with a step's number of tokens."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from expertly.bench.sweep import Sweep
from expertly.kernels.packed_experts import packed_experts_forward
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.inspect import part_of
from expertly.models.loading import Model
from expertly.models.packing import experts_modules, head_name
from expertly.plan.precision import Precision
from expertly.plan.shape import Layer
from expertly.plan.touched import experts_touched

_MOST = 32  # matrices or stacks of a part, one after the other: together they are in no cache
_ROUNDS, _SECONDS = 8, 2.0  # of a part, at most; two rounds at least
_HEAD_DIM = 64  # where no module says its own


class Tokens(NamedTuple):
    """What one step brings: its tokens, how many have their logits computed, experts of each."""

    body: int
    head: int
    top_k: int


class Call(NamedTuple):
    """A product with one packed matrix or stack; flops: 2 for each weight that a token meets.

    bytes: of its weights that are read.
    """

    flops: float
    bytes: float
    run: Callable[[], object]


@torch.inference_mode()
def packed_rates(
    model: Model, tiny: Model, tokens: Tokens, formats: Precision, sweep: Sweep
) -> dict[str, float]:
    """FLOP/s by format and part, as plan.hardware.flops_at reads them.

    A call takes some time whatever it multiplies, which is part of a layer's overhead already: what
    the same call takes on the tiny model's matrices, behind as many bytes, is left out. There is no
    rate where nothing remains.
    """
    rates, tiny_calls = {}, _calls(tiny, tokens)
    for part, calls in _calls(model, tokens).items():
        size = fmean(call.bytes for call in calls)
        nothing = tiny_calls.get(part, [])
        took = _seconds(calls) / len(calls)
        if nothing:
            took -= _seconds(nothing, sweep, size) / len(nothing)
        if took > 0:
            rates[f"{formats[part].name} {part}"] = fmean(call.flops for call in calls) / took
    return rates


@torch.inference_mode()
def attention_rate(model: Model, layer: Layer, tokens: int) -> float:
    """FLOP/s of attention itself over a prompt: of the pairs that are looked at, each once."""
    dims = (getattr(module, "head_dim", None) for module in model.modules())
    dim = next((dim for dim in dims if isinstance(dim, int)), _HEAD_DIM)
    heads = max(1, layer.attention.pair // (2 * dim))
    q, k, v = torch.randn(3, 1, heads, tokens, dim).to(model.dtype)
    attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    pairs = tokens * (tokens + 1) / 2
    return 4.0 * heads * dim * pairs / _seconds([Call(0.0, 0.0, attend)])


def faster(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Of two measurements the best rates."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _calls(model: Model, tokens: Tokens) -> dict[str, list[Call]]:
    """A call for every packed weight, by part; of many the first."""
    found: dict[str, list[Call]] = defaultdict(list)
    for part, call in (*_linear_calls(model, tokens), *_expert_calls(model, tokens)):
        if len(found[part]) < _MOST:
            found[part].append(call)
    return found


def _linear_calls(model: Model, tokens: Tokens) -> Iterator[tuple[str, Call]]:
    head = head_name(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            rows = tokens.head if name == head else tokens.body
            weights = module.in_features * module.out_features
            x = torch.randn(rows, module.in_features).to(model.dtype)
            yield (
                part_of(f"{name}.weight"),
                Call(2.0 * rows * weights, module.weight.nbytes, partial(module, x)),
            )


def _expert_calls(model: Model, tokens: Tokens) -> Iterator[tuple[str, Call]]:
    """Tokens choose at random, every expert as often as any other."""
    for experts in experts_modules(model).values():
        packed: Any = experts.packed
        x = torch.randn(tokens.body, packed.dim).to(model.dtype)
        scores, ids = torch.rand(tokens.body, packed.num_experts).topk(tokens.top_k)
        weights = packed.dim * packed.hidden * (3 if packed.gated else 2)
        run = partial(packed_experts_forward, experts, packed, x, ids, scores)
        share = experts_touched(packed.num_experts, tokens.top_k, tokens.body) / packed.num_experts
        size = share * (packed.gate_up.nbytes + packed.down.nbytes)
        yield "experts", Call(2.0 * tokens.body * tokens.top_k * weights, size, run)


def _seconds(calls: list[Call], sweep: Sweep | None = None, size: float = 0.0) -> float:
    """Seconds of all calls, one after the other, in the best round.

    sweep: reads so many bytes before each of them.
    """
    best, started = float("inf"), time.perf_counter()
    clock = sweep or time.perf_counter
    for turn in range(_ROUNDS):
        before = clock()
        for call in calls:
            if sweep:
                sweep.read(size)
            call.run()
        best = min(best, clock() - before)
        now = time.perf_counter()
        if turn and now - started > _SECONDS:
            break
    return best
