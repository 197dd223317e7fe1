"""What training a model takes: bytes on each GPU, and FLOPs.

The states (weights, gradients, AdamW) follow from parameters alone; activations.py has the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import gcd
from typing import NamedTuple

from expertly.errors import ExpertlyError, nearest
from expertly.plan import activations
from expertly.plan.memory import keys_and_values, looked_back, queries, require
from expertly.plan.precision import Precision, precision, weight_bytes
from expertly.plan.shape import Layer, Shape, parameters, parts_of

METHODS = ("full", "lora", "qlora")
IMBALANCE = 1.5  # of the tokens on the fullest GPU over the mean, while routers learn
_FLOAT = 4  # bytes: the loss computes in fp32, whatever the weights are in
_UNSHARED = ("gathered", "activations", "dispatch", "logits")  # what FSDP does not divide
_STATES = 16  # bytes of a trained weight: itself, its gradient, a master copy if mixed, AdamW's two


class Layout(NamedTuple):
    """How many ways a model is spread: data (fully sharded), experts, tensors.

    The GPUs are fsdp x tp; the groups that share out experts lie across both.
    """

    fsdp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """How many GPUs there are."""
        return self.fsdp * self.tp


_ALONE = Layout()


@dataclass(frozen=True, kw_only=True)
class Training:
    """Bytes on each GPU, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # the layers that FSDP has put together for a moment
    activations: float
    dispatch: float  # copies of tokens at their experts, and what these make of them
    logits: float

    @property
    def total(self) -> float:
        """Everything together."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


class Least(NamedTuple):
    """The fewest GPUs that a training fits on, or the most that were tried."""

    layout: Layout
    held: Training  # on each of them
    fits: bool
    largest: str  # of the parts that more GPUs do not make smaller


class _Held(NamedTuple):
    """Some weights: bytes of those that stay as they are, number of those that are trained."""

    frozen: float
    trained: float


def training(
    shape: Shape,
    *,
    layout: Layout = _ALONE,
    method: str = "full",
    rank: int = 16,
    mixed: bool = True,
    checkpointing: bool = True,
    batch: int = 1,
    context: int = 4096,
    imbalance: float = IMBALANCE,
) -> Training:
    """Bytes per GPU to train with AdamW on `batch` sequences of `context` tokens per FSDP rank.

    method: "full"; "lora" with adapters of `rank` on attention and every feed-forward, experts as
    PEFT's target_parameters have them; "qlora" with the weights below them in 4 bits, groups of
    64. mixed: bf16 with an fp32 master copy. imbalance: of the fullest GPU's tokens, with ep > 1.
    Norms and routers count as spread, though tensor parallelism copies them. Not in it: what the
    allocator wastes and the gradients of one layer's activations. Raises E208 for a method, a
    layout or a number that cannot be.
    """
    _check(shape, layout, method)
    numbers = {"--rank": rank, "--batch": batch, "--context": context, "--imbalance": imbalance}
    for flag, number in numbers.items():
        require(flag, number, 1)
    kept = _whole(shape, method, rank, mixed)
    width = 2 if mixed else _FLOAT
    tokens = batch * context
    per_token = activations.saved(shape, width, tp=layout.tp, checkpointing=checkpointing)
    copies = activations.saved_by_experts(
        shape, width, ep=layout.ep, tp=layout.tp, checkpointing=checkpointing, imbalance=imbalance
    )
    return Training(
        weights=(kept.frozen + kept.trained * width) / layout.world,
        gradients=kept.trained * width / layout.world,
        optimizer=kept.trained * (_STATES - 2 * width) / layout.world,
        gathered=_gathered(shape, layout, method, rank, mixed),
        activations=tokens * per_token,
        dispatch=tokens * copies,
        # as the model gives them; the loss has their log-probabilities, and two gradients of them
        logits=tokens * shape.vocab * (width + 3 * _FLOAT),
    )


def least_gpus(
    shape: Shape, memory: float, trained: Callable[..., Training], most: int = 4096
) -> Least:
    """The fewest GPUs of `memory` bytes each, a power of two up to `most`, that hold a training.

    trained: what each GPU holds, by its keyword `layout`. All GPUs shard the model fully; experts
    are gathered like the rest, or, where that does not fit, lie spread over as many GPUs as divide
    both them and the GPUs.
    """
    gpus, experts = 1, gcd(*(layer.feed_forward.experts for layer in shape.moe_layers))
    while True:
        layouts = [Layout(fsdp=gpus, ep=ep) for ep in sorted({1, gcd(gpus, experts) or 1})]
        tried = [(layout, trained(layout=layout)) for layout in layouts]
        fitting = [each for each in tried if each[1].total <= memory]
        if fitting or 2 * gpus > most:
            layout, held = fitting[0] if fitting else min(tried, key=lambda each: each[1].total)
            sizes = asdict(held)
            return Least(layout, held, bool(fitting), max(_UNSHARED, key=lambda part: sizes[part]))
        gpus *= 2


def flops_per_token(shape: Shape, *, context: int, training: bool = False) -> float:
    """FLOPs of one token in a forward pass, on average over a sequence of `context`.

    Two for every parameter that it meets in a product (not in the embeddings or norms; in the head
    also where it is the embeddings again), two for every multiply-add with the tokens it looks back
    at. Training is three times forward, without recomputation (PaLM, appendix B).
    """
    active = {part: count.active for part, count in parameters(shape).items()}
    products = sum(active.values()) - active.get("embeddings", 0) - active.get("norms", 0)
    products += shape.vocab * shape.dim if shape.tied else 0
    looks = sum(
        many * layer.attention.pair * looked_back(layer.attention.window, context)
        for layer, many in shape.kinds.items()
    )
    return 2 * (products + looks) * (3 if training else 1)


def training_flops(shape: Shape, tokens: float, *, context: int) -> float:
    """FLOPs to train on so many tokens, in sequences of `context`."""
    return tokens * flops_per_token(shape, context=context, training=True)


def _check(shape: Shape, layout: Layout, method: str) -> None:
    """Raises E208 for a method or a layout that cannot be, with the reason."""
    if method not in METHODS:
        fix = nearest(method, METHODS)
        raise ExpertlyError("E208", "--method", f"{method[:40]!r} is none", fix=fix)
    for name, ways in layout._asdict().items():
        require(f"--{name}", ways, 1)
    ep, why = layout.ep, ""
    counts = {layer.feed_forward.experts for layer in shape.kinds}
    if ep > 1 and ep % layout.tp:
        why = f"is {ep}, which is no multiple of --tp {layout.tp}"
    elif layout.world % ep:
        why = f"is {ep}, which does not divide {layout.world} GPUs, fsdp x tp"
    elif uneven := [experts for experts in counts if experts % ep]:
        why = f"is {ep}, which does not divide {uneven[0]} experts"
    if why:
        raise ExpertlyError("E208", "--ep", why, fix="correct --ep")


def _whole(shape: Shape, method: str, rank: int, mixed: bool) -> _Held:
    """The whole model."""
    base = _base(shape, method, mixed)
    held = [(_root(shape, method, base), 1)]
    for layer, many in shape.kinds.items():
        held.extend((each, many) for each in _of_layer(layer, shape, method, rank, base))
    frozen = sum(many * each.frozen for each, many in held)
    return _Held(frozen, sum(many * each.trained for each, many in held))


def _base(shape: Shape, method: str, mixed: bool) -> Precision:
    """What the weights below adapters are in."""
    return precision(shape, "bf16" if mixed else "fp32", "4g64" if method == "qlora" else None)


def _root(shape: Shape, method: str, base: Precision) -> _Held:
    """What is in no layer: embeddings, head, last norm."""
    parts = {name: getattr(shape, name) for name in ("embeddings", "head", "norms", "other")}
    return _held(parts, method, 0, base)


def _of_layer(
    layer: Layer, shape: Shape, method: str, rank: int, base: Precision
) -> tuple[_Held, _Held]:
    """One layer without its routed experts, and these."""
    parts = parts_of(layer)
    experts = {"experts": parts.pop("experts")}
    beside, of_experts = _adapters(layer, shape, rank)
    return _held(parts, method, beside, base), _held(experts, method, of_experts, base)


def _held(parts: Mapping[str, int], method: str, adapters: float, base: Precision) -> _Held:
    if method == "full":
        return _Held(0, sum(parts.values()))
    return _Held(sum(weight_bytes(count, base[part]) for part, count in parts.items()), adapters)


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


def _gathered(shape: Shape, layout: Layout, method: str, rank: int, mixed: bool) -> float:
    """Bytes of what FSDP has put together at its peak, in the backward pass.

    The root stays together; of the layers there are one, the next to come, and the gradients of
    one. Experts that nobody else on this GPU's FSDP axis has are never apart.
    """
    width, base = 2 if mixed else _FLOAT, _base(shape, method, mixed)
    ways = max(layout.ep, layout.tp)
    dense, experts = layout.fsdp > 1, layout.world > ways
    root = _root(shape, method, base)
    peak = 0.0
    for layer in shape.kinds:
        beside, routed = _of_layer(layer, shape, method, rank, base)
        here = dense * _together(beside, width, 2) / layout.tp
        peak = max(peak, here + experts * _together(routed, width, 2) / ways)
    return dense * _together(root, width, 1) / layout.tp + peak


def _together(held: _Held, width: int, copies: int) -> float:
    """Bytes of so many copies of weights, and of one of their gradients."""
    return copies * (held.frozen + held.trained * width) + held.trained * width
