"""How long a step takes at best: the roofline (Williams et al. 2009), part by part.

Each part takes as long as its bytes or its FLOPs do, whichever is longer; then come launching
kernels and, with several GPUs, all-reduces. A measured step is slower, never faster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import NamedTuple

from expertly.plan.hardware import Device, Link, between, flops_at
from expertly.plan.memory import ACTIVATION, kv_cache, looked_back, require
from expertly.plan.precision import Precision, weights
from expertly.plan.shape import Shape, parameters
from expertly.plan.touched import experts_touched, touched_spread

BATCHES = tuple(2**power for power in range(11))  # 1 to 1024

# kernels of a layer when fused as usual: attention with its norms and a feed-forward; and what
# a router adds: scores, top-k, weights, sort, offsets, dispatch, combine, its own GEMM
_KERNELS, _MOE_KERNELS = 10, 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of all GPUs together: decoding one token of each sequence, or prefilling."""

    tokens: float  # that it handles
    seconds: float
    by_part: dict[str, float]  # seconds; also "kv cache", "overhead" and "links"
    bytes: float  # read from memory
    flops: float
    sigma: float  # seconds, standard deviation: how many experts a batch happens to touch

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.tokens / self.seconds


class Race(NamedTuple):
    """An MoE beside a dense model at one batch size; each ratio is above 1 where the MoE leads."""

    batch: int
    moe: Step
    dense: Step
    ratio: float  # of tokens per second
    bytes_ratio: float
    flops_ratio: float


class _Work(NamedTuple):
    bytes: float
    flops: float
    rate: float  # FLOP/s of one GPU


def decode(
    shape: Shape,
    precision: Precision,
    device: Device,
    *,
    batch: int = 1,
    context: int = 4096,
    kv_bits: float = 16,
    gpus: int = 1,
    overhead: float | None = None,
) -> Step:
    """One new token for each of `batch` sequences that are `context` tokens long.

    gpus share every layer (tensor parallel) over what joins them, and the cache as far as
    `kv_cache` says. overhead: seconds per layer for launching kernels; None: so many kernels, by
    the device's figure. Raises E208 for less than one sequence or GPU.
    """
    _check(batch, gpus)
    decoder = shape.decoder
    work = _weights(decoder, precision, device, tokens=batch, heads=batch)
    seen = [(layer.attention, many) for layer, many in decoder.kinds.items()]
    pairs = sum(
        many * (each.absorbed or each.pair) * _seen(context, each.window) for each, many in seen
    )
    cache = kv_cache(decoder, context, kv_bits, batch=batch, gpus=gpus)
    work["kv cache"] = _Work(cache, 2.0 * batch * pairs, flops_at(device, "bf16", "kv cache"))
    step = _step(decoder, work, device, gpus, batch)
    return _with_costs(step, decoder, device, gpus=gpus, overhead=overhead)


def prefill(
    shape: Shape,
    precision: Precision,
    device: Device,
    *,
    tokens: int,
    kv_bits: float = 16,
    gpus: int = 1,
    overhead: float | None = None,
) -> Step:
    """All of one prompt of `tokens` tokens at once; of an encoder-decoder, its encoder.

    A token looks back at half of its prompt on average, or at its window; an encoder's looks at
    all. Only the last token has its logits computed. The rest is as in `decode`.
    """
    require("tokens", tokens, 1)
    _check(1, gpus)
    source = replace(shape, layers=shape.encoder, encoder=()) if shape.encoder else shape
    heads = 0 if shape.encoder else 1
    work = _weights(source, precision, device, tokens=tokens, heads=heads)
    pairs = sum(
        many * each.pair * (tokens if shape.encoder else looked_back(each.window, tokens))
        for each, many in ((layer.attention, many) for layer, many in source.kinds.items())
    )
    written = 0.0 if shape.encoder else kv_cache(source, tokens, kv_bits, gpus=gpus)
    work["kv cache"] = _Work(written, 2.0 * tokens * pairs, flops_at(device, "bf16", "kv cache"))
    step = _step(source, work, device, gpus, tokens)
    return _with_costs(step, source, device, gpus=gpus, overhead=overhead)


def race(
    shape: Shape,
    dense: Shape,
    precision: Precision,
    device: Device,
    *,
    dense_precision: Precision | None = None,
    batches: Iterable[int] = BATCHES,
    context: int = 4096,
    kv_bits: float = 16,
    gpus: int = 1,
) -> list[Race]:
    """Decode steps of an MoE and of a dense model at each batch size; see `decode`.

    dense_precision: of the dense model where it is another one.
    """
    step = partial(decode, device=device, context=context, kv_bits=kv_bits, gpus=gpus)
    other = dense_precision or precision
    return [
        _beside(batch, step(shape, precision, batch=batch), step(dense, other, batch=batch))
        for batch in batches
    ]


def batches_with(batch: int) -> list[int]:
    """Those of BATCHES and the one that is asked for, in order."""
    return sorted({*BATCHES, batch})


def fades_at(races: Sequence[Race]) -> int | None:
    """The first batch at which the MoE leads by less than half of what it leads by at the first.

    None where it never does, or never led. Past it the lead can come back: once compute is what
    takes the time, the FLOPs ratio counts again.
    """
    lead = races[0].ratio - 1
    return next((each.batch for each in races if lead > 0 and each.ratio - 1 < lead / 2), None)


def routing_tax(
    shape: Shape,
    precision: Precision,
    device: Device,
    *,
    batch: int = 1,
    context: int = 4096,
    kv_bits: float = 16,
    gpus: int = 1,
) -> float:
    """The share of a decode step that its dense rival of equal compute does without.

    The router's GEMM, the launches of the kernels that route, and what tokens' copies for their
    experts read and write: in to dispatch and out to combine, each once written and once read.
    Every GPU has all of these copies. The arguments are those of `decode`.
    """
    step = decode(
        shape, precision, device, batch=batch, context=context, kv_bits=kv_bits, gpus=gpus
    )
    moes = [layer.feed_forward for layer in shape.layers if layer.feed_forward.experts]
    copies = batch * sum(moe.top_k for moe in moes) * shape.dim * ACTIVATION
    dispatch = 4 * copies / device.bandwidth
    launches = len(moes) * _MOE_KERNELS * device.kernel
    tax = step.by_part.get("router", 0.0) + launches + dispatch
    return tax / (step.seconds + dispatch)


def _check(batch: int, gpus: int) -> None:
    require("--batch", batch, 1)
    require("--gpus", gpus, 1)


def _beside(batch: int, moe: Step, dense: Step) -> Race:
    return Race(
        batch,
        moe,
        dense,
        ratio=dense.seconds / moe.seconds,
        bytes_ratio=dense.bytes / moe.bytes,
        flops_ratio=dense.flops / moe.flops,
    )


def _weights(
    shape: Shape, precision: Precision, device: Device, *, tokens: int, heads: int
) -> dict[str, _Work]:
    """The work on each part's weights. heads: how many tokens have their logits computed."""
    flops = {part: 2.0 * tokens * count.active for part, count in parameters(shape).items()}
    flops.update(embeddings=0.0, norms=0.0, head=0.0)
    flops["embeddings" if shape.tied else "head"] = 2.0 * heads * shape.vocab * shape.dim
    return {
        part: _Work(held.touched, flops[part], flops_at(device, precision[part].name, part))
        for part, held in weights(shape, precision, tokens).items()
    }


def _step(shape: Shape, work: dict[str, _Work], device: Device, gpus: int, tokens: int) -> Step:
    """The roofline of every part, added up."""
    bandwidth = device.bandwidth * gpus
    by_part = {
        part: max(each.bytes / bandwidth, each.flops / (each.rate * gpus))
        for part, each in work.items()
    }
    return Step(
        tokens=tokens,
        seconds=sum(by_part.values()),
        by_part=by_part,
        bytes=sum(each.bytes for each in work.values()),
        flops=sum(each.flops for each in work.values()),
        sigma=_sigma(shape, work, device, gpus, tokens),
    )


def _sigma(shape: Shape, work: dict[str, _Work], device: Device, gpus: int, tokens: int) -> float:
    """Seconds by which the experts' part varies; none where compute is what takes the time."""
    experts = work.get("experts")
    bandwidth = device.bandwidth * gpus
    if not experts or experts.bytes / bandwidth < experts.flops / (experts.rate * gpus):
        return 0.0
    touched = spread = 0.0
    for layer, many in shape.kinds.items():
        moe = layer.feed_forward
        touched += many * moe.expert * experts_touched(moe.experts, moe.top_k, tokens)
        spread += many * (moe.expert * touched_spread(moe.experts, moe.top_k, tokens)) ** 2
    return sqrt(spread) / touched * experts.bytes / bandwidth


def _with_costs(
    step: Step,
    shape: Shape,
    device: Device,
    *,
    gpus: int,
    overhead: float | None,
) -> Step:
    """The step with what every layer costs beside its work: launches, and all-reduces."""
    layers = len(shape.layers)
    kernels = device.kernel * (_KERNELS * layers + _MOE_KERNELS * len(shape.moe_layers))
    costs = {"overhead": kernels if overhead is None else overhead * layers}
    if gpus > 1:
        reduced = step.tokens * shape.dim * ACTIVATION
        costs["links"] = 2 * layers * _all_reduce(reduced, gpus, between(device, gpus))
    return replace(
        step,
        seconds=step.seconds + sum(costs.values()),
        by_part=step.by_part | costs,
    )


def _all_reduce(size: float, gpus: int, link: Link) -> float:
    """Seconds: a reduce-scatter and an all-gather, in which each GPU sends all shares but its own.

    size: bytes.
    """
    return 2 * (link.latency + (gpus - 1) / gpus * size / link.bandwidth)


def _seen(context: float, window: int | None) -> float:
    return context if window is None else min(context, window)
