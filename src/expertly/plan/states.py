"""The weights that a training holds: bytes of those that stay, numbers of those that it trains."""

from collections.abc import Mapping
from typing import NamedTuple

from expertly.plan.memory import keys_and_values, queries
from expertly.plan.precision import Precision, precision, weight_bytes
from expertly.plan.shape import Layer, Shape, parts_of


class Held(NamedTuple):
    """Some weights: bytes of those that stay as they are, number of those that are trained."""

    frozen: float
    trained: float


def states(shape: Shape, method: str, rank: int, base: Precision) -> Held:
    """The whole model, with adapters of `rank` unless the method is "full"."""
    held = [(root(shape, method, base), 1)]
    for layer, many in shape.kinds.items():
        held.extend((each, many) for each in layer_states(layer, shape, method, rank, base))
    frozen = sum(many * each.frozen for each, many in held)
    return Held(frozen, sum(many * each.trained for each, many in held))


def below_adapters(shape: Shape, method: str, mixed: bool) -> Precision:
    """What the weights below adapters are in; qlora: 4 bits, groups of 64."""
    return precision(shape, "bf16" if mixed else "fp32", "4g64" if method == "qlora" else None)


def root(shape: Shape, method: str, base: Precision) -> Held:
    """What is in no layer: embeddings, head, last norm."""
    parts = {name: getattr(shape, name) for name in ("embeddings", "head", "norms")}
    return _held(parts | {"other": shape.other + shape.beside}, method, 0, base)


def layer_states(
    layer: Layer, shape: Shape, method: str, rank: int, base: Precision
) -> tuple[Held, Held]:
    """One layer without its routed experts, and these."""
    parts = parts_of(layer)
    experts = {"experts": parts.pop("experts")}
    beside, of_experts = _adapters(layer, shape, rank)
    return _held(parts, method, beside, base), _held(experts, method, of_experts, base)


def together(held: Held, width: int, copies: int) -> float:
    """Bytes of so many copies of weights, and of one of their gradients; width: of an element."""
    return copies * (held.frozen + held.trained * width) + held.trained * width


def _held(parts: Mapping[str, int], method: str, adapters: float, base: Precision) -> Held:
    if method == "full":
        return Held(0, sum(parts.values()))
    return Held(sum(weight_bytes(count, base[part]) for part, count in parts.items()), adapters)


def _adapters(layer: Layer, shape: Shape, rank: int) -> tuple[float, float]:
    """Parameters of a layer's adapters, beside and in its routed experts.

    A matrix of (out, in) gets rank x (out + in); of experts all ranks lie side by side. Those of
    latent attention, which has more and smaller matrices, are an estimate.
    """
    attention, moe, dim = layer.attention, layer.feed_forward, shape.dim
    matrices = 3 if shape.gated else 2
    attended = 4 * dim + queries(layer) + keys_and_values(layer) + attention.width
    beside = attended * bool(attention.weights) + matrices * (dim + moe.width) * bool(moe.width)
    expert = 2 * dim + matrices * moe.expert_width  # gate and up are one matrix
    return rank * beside, rank * moe.experts * expert
