"""What training a model takes: bytes on each GPU, and FLOPs.

The states (weights, gradients, AdamW) follow from parameters alone; activations.py has the rest.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import gcd
from typing import NamedTuple

from expertly.errors import ExpertlyError, nearest
from expertly.plan import activations
from expertly.plan.memory import looked_back, require
from expertly.plan.precision import Precision
from expertly.plan.shape import Shape, parameters
from expertly.plan.states import below_adapters, layer_states, root, states, together

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

    @property
    def ways(self) -> int:
        """Into how many shares the routed experts are split before FSDP shards each."""
        return max(self.ep, self.tp)


ALONE = Layout()


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
    """The GPUs that a training fits on, or, where it fits on none, the most that were tried."""

    layout: Layout
    held: Training  # on each of them
    fits: bool
    largest: str  # of the parts that more GPUs do not make smaller


def training(
    shape: Shape,
    *,
    layout: Layout = ALONE,
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
    check(shape, layout, method)
    numbers = {"--rank": rank, "--train-batch": batch, "--context": context}
    for flag, number in (numbers | {"--imbalance": imbalance}).items():
        require(flag, number, 1)
    base, width = below_adapters(shape, method, mixed), 2 if mixed else _FLOAT
    kept = states(shape, method, rank, base)
    tokens = batch * context
    per_token = activations.saved(shape, width, tp=layout.tp, checkpointing=checkpointing)
    copies = activations.saved_by_experts(
        shape, width, ep=layout.ep, tp=layout.tp, checkpointing=checkpointing, imbalance=imbalance
    )
    return Training(
        weights=(kept.frozen + kept.trained * width) / layout.world,
        gradients=kept.trained * width / layout.world,
        optimizer=kept.trained * (_STATES - 2 * width) / layout.world,
        gathered=_gathered(shape, layout, method, rank, width, base),
        activations=tokens * per_token,
        dispatch=tokens * copies,
        # as the model gives them; the loss has their log-probabilities, and two gradients of them
        logits=tokens * shape.vocab * (width + 3 * _FLOAT),
    )


def least_gpus(
    shape: Shape, memory: float, trained: Callable[..., Training], most: int = 4096
) -> Least:
    """The fewest GPUs of `memory` bytes each, a power of two up to `most`, that hold a training.

    trained: what each GPU holds, by its keyword `layout`.
    """
    gpus = 1
    while True:
        found = best_layout(shape, memory, trained, gpus)
        if found.fits or 2 * gpus > most:
            return found
        gpus *= 2


def best_layout(shape: Shape, memory: float, trained: Callable[..., Training], gpus: int) -> Least:
    """So many GPUs of `memory` bytes, all of which shard the model fully.

    Experts are gathered like the rest, or, where that does not fit, lie spread over as many GPUs
    as divide both them and the GPUs. trained: as in `least_gpus`.
    """
    experts = gcd(*(layer.feed_forward.experts for layer in shape.moe_layers)) or 1
    layouts = [Layout(fsdp=gpus, ep=ep) for ep in sorted({1, gcd(gpus, experts)})]
    tried = [(layout, trained(layout=layout)) for layout in layouts]
    fitting = [each for each in tried if each[1].total <= memory]
    layout, held = fitting[0] if fitting else min(tried, key=lambda each: each[1].total)
    sizes = asdict(held)
    return Least(layout, held, bool(fitting), max(_UNSHARED, key=lambda part: sizes[part]))


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


def check(shape: Shape, layout: Layout, method: str) -> None:
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


def _gathered(
    shape: Shape, layout: Layout, method: str, rank: int, width: int, base: Precision
) -> float:
    """Bytes of what FSDP has put together at its peak, in the backward pass.

    The root stays together; of the layers there are one, the next to come, and the gradients of
    one. Experts that nobody else on this GPU's FSDP axis has are never apart.
    """
    dense, experts = layout.fsdp > 1, layout.world > layout.ways
    peak = 0.0
    for layer in shape.kinds:
        beside, routed = layer_states(layer, shape, method, rank, base)
        here = dense * together(beside, width, 2) / layout.tp
        peak = max(peak, here + experts * together(routed, width, 2) / layout.ways)
    return dense * together(root(shape, method, base), width, 1) / layout.tp + peak
