"""What serving a model takes: weights, KV cache, activations and dispatch buffers.

Each as two numbers: what has to lie in memory, and what one decode step of the whole batch reads.
"""

from dataclasses import dataclass

from expertly.errors import ExpertlyError
from expertly.plan import precision as formats
from expertly.plan.precision import Bytes, Precision
from expertly.plan.shape import Attention, Layer, Shape

ACTIVATION = 2  # bytes: weights of few bits compute in half precision too
_LOGIT = 4
CHUNK = 2048  # tokens that a prefill takes at a time


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by what they are for; `touched` of each is one decode step's."""

    weights: Bytes
    kv_cache: Bytes
    activations: Bytes
    dispatch: Bytes

    @property
    def total(self) -> Bytes:
        """Everything together."""
        parts = (self.weights, self.kv_cache, self.activations, self.dispatch)
        return Bytes(sum(each.resident for each in parts), sum(each.touched for each in parts))


def kv_elements(shape: Shape) -> int:
    """Elements that a token leaves in the KV cache of all layers, before any window is full."""
    return sum(many * layer.attention.cache for layer, many in shape.decoder.kinds.items())


def kv_per_token(shape: Shape, kv_bits: float = 16) -> float:
    """Bytes of `kv_elements`."""
    return kv_elements(shape) * kv_bits / 8


def kv_cache(
    shape: Shape, context: float, kv_bits: float = 16, *, batch: int = 1, gpus: int = 1
) -> float:
    """Bytes of `batch` sequences of `context` tokens, on all GPUs together.

    A layer with a window keeps only so many tokens. GPUs share the cache out by its sequences, and
    one sequence by its key heads, of which a latent has none: where there are more GPUs than that,
    some hold the same. kv_bits counts scales and zeros too, as the 6 bits on average of
    DeepSeek-V2 (section 3.2.3).
    """
    kept = (
        many * _kept(layer.attention, context) * gpus / min(gpus, layer.attention.shards * batch)
        for layer, many in shape.decoder.kinds.items()
    )
    return batch * sum(kept) * kv_bits / 8


def serving(
    shape: Shape,
    precision: Precision,
    *,
    context: int,
    batch: int = 1,
    kv_bits: float = 16,
    gpus: int = 1,
    imbalance: float = 1.0,
) -> Memory:
    """Bytes to serve `batch` sequences of `context` tokens, prefilled 2,048 tokens at a time.

    Of all GPUs together: they share the weights out, the cache as far as `kv_cache` says, and each
    has all activations. imbalance: how many more copies of tokens the fullest GPU gets than an
    average one. Attention is taken as fused, without a matrix of scores. Raises E208 for numbers
    out of range.
    """
    require("--context", context, 1)
    require("--batch", batch, 1, 1e6)
    require("--kv-bits", kv_bits, 1, 32)
    require("--gpus", gpus, 1)
    require("--imbalance", imbalance, 1, 1000)
    held = formats.weights(shape, precision, batch).values()
    cache = kv_cache(shape, context, kv_bits, batch=batch, gpus=gpus)
    tokens = min(CHUNK, batch * context)
    return Memory(
        weights=Bytes(sum(each.resident for each in held), sum(each.touched for each in held)),
        kv_cache=Bytes(cache, cache),
        activations=_times(gpus, _activations(shape, tokens, batch)),
        dispatch=_times(gpus, _dispatch(shape, tokens * imbalance, batch * imbalance)),
    )


def queries(layer: Layer) -> int:
    """Elements of a token's queries: a pair costs one multiply-add for each, and for each value."""
    return layer.attention.pair - layer.attention.width


def keys_and_values(layer: Layer) -> int:
    """Elements of a token's keys and values as attention reads them: of a latent, unfolded."""
    attention = layer.attention
    return attention.pair if attention.absorbed else attention.cache


def looked_back(window: int | None, context: float) -> float:
    """At how many tokens one looks, itself included, on average over a sequence of `context`.

    The first looks at one, the next at two, until a window is full.
    """
    full = min(window or context, context)
    return full * (1 - (full - 1) / (2 * context))


def require(flag: str, value: float, least: float, most: float = 1e15) -> None:
    """Raises E208 for a number outside its range, or none."""
    if not least <= value <= most:
        upto = f" to {most:g}" if most < 1e15 or value > most else ""
        why = f"is {value:g}, expected a number from {least:g}{upto}"
        raise ExpertlyError("E208", flag, why, fix=f"correct {flag}")


def _kept(attention: Attention, context: float) -> float:
    """Elements that a layer keeps of one sequence."""
    return attention.cache * min(context, attention.window or context)


def _times(gpus: int, each: Bytes) -> Bytes:
    return Bytes(gpus * each.resident, gpus * each.touched)


def _activations(shape: Shape, tokens: float, batch: float) -> Bytes:
    """The residual, the widest moment of any layer and the last position's logits."""
    kinds = shape.decoder.kinds
    moments = {layer: shape.dim + _widest(layer, shape) for layer in kinds}
    logits = _LOGIT * shape.vocab * batch
    resident = ACTIVATION * tokens * max(moments.values(), default=0) + logits
    passed = sum(kinds[layer] * moment for layer, moment in moments.items())
    return Bytes(resident, ACTIVATION * batch * passed + logits)


def _widest(layer: Layer, shape: Shape) -> int:
    """Elements per token beside the residual at once: in attention, or in a dense feed-forward."""
    attending = queries(layer) + keys_and_values(layer) + layer.attention.width
    return shape.dim + max(attending, _results(shape) * layer.feed_forward.width)


def _dispatch(shape: Shape, tokens: float, batch: float) -> Bytes:
    """Of one layer at a time; a step passes all of them."""
    kinds = shape.decoder.kinds
    routed = {layer: _routed(layer, shape) for layer in kinds}
    resident = ACTIVATION * tokens * max(routed.values(), default=0)
    passed = sum(kinds[layer] * each for layer, each in routed.items())
    return Bytes(resident, ACTIVATION * batch * passed)


def _routed(layer: Layer, shape: Shape) -> int:
    """Elements of a token on the way through its experts: copies, what is inside, answers."""
    moe = layer.feed_forward
    return moe.top_k * (2 * shape.dim + _results(shape) * moe.expert_width)


def _results(shape: Shape) -> int:
    """How many results as wide as itself a feed-forward has: gate and up, or one, and theirs."""
    return 3 if shape.gated else 2
