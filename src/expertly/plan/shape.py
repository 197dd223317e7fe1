"""A model as arithmetic sees it: what every layer holds, and what one token uses of it.

Everything else in this room is a function of a Shape. reading.py makes one from a config.json;
models/count.py counts the parts of a family that has no formulas here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

# the parts of a model, as inspect calls them, in the order of a token's way through it
PARTS = (
    "embeddings",
    "attention",
    "norms",
    "router",
    "experts",
    "shared experts",
    "dense layers",
    "head",
    "other",
)


class Count(NamedTuple):
    """Parameters: all that are stored, and those that one token uses."""

    total: int
    active: int


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention; sizes in elements."""

    weights: int = 0  # parameters of its projections, biases included, norms not
    norms: int = 0  # parameters of its norms: of queries, keys or latents
    width: int = 0  # of all heads' outputs together
    cache: int = 0  # what a token leaves in the KV cache
    shards: int = 1  # GPUs that can share it out by its heads; a latent has none
    pair: int = 0  # multiply-adds for a token and one token that it looks back at
    absorbed: int = 0  # the same in decoding, where the cache holds a latent; 0: as pair
    window: int | None = None  # how many tokens it looks back at; None: all


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """One layer's feed-forward network: dense, or experts with a router; in parameters."""

    dense: int = 0
    width: int = 0  # of the dense network, or of the shared experts together
    router: int = 0
    expert: int = 0  # of one routed expert
    expert_width: int = 0
    experts: int = 0  # how many are routed
    top_k: int = 0
    shared: int = 0  # of the always-on experts together, and of their gate


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block: attention, feed-forward, and the norms around them."""

    attention: Attention
    feed_forward: FeedForward
    norms: int = 0
    other: int = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model. layers: those that every new token passes; encoder: those that only a source does.

    head: parameters of the output projection, 0 when it is the embeddings again.
    """

    name: str
    family: str
    dim: int
    vocab: int
    layers: tuple[Layer, ...]
    encoder: tuple[Layer, ...] = ()
    embeddings: int
    head: int = 0
    norms: int = 0  # after the last layer
    other: int = 0
    beside: int = 0  # what no token of text passes, such as a vision tower
    gated: bool = True  # a feed-forward has three matrices, not two
    context: int | None = None  # the longest that it was made for
    stored: Mapping[str, str] | None = None  # part -> the format that its checkpoint has it in
    notes: tuple[str, ...] = ()

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings again."""
        return self.head < self.vocab * self.dim

    @cached_property
    def blocks(self) -> tuple[Layer, ...]:
        """All layers, the encoder's too."""
        return self.encoder + self.layers

    @cached_property
    def moe_layers(self) -> tuple[Layer, ...]:
        """Those with routed experts."""
        return tuple(layer for layer in self.blocks if layer.feed_forward.experts)

    @cached_property
    def kinds(self) -> Mapping[Layer, int]:
        """Its blocks, equal ones as one, with how many there are: sums over these are quick."""
        return Counter(self.blocks)

    @cached_property
    def decoder(self) -> "Shape":
        """It without an encoder, which runs once on a source."""
        return replace(self, encoder=()) if self.encoder else self

    @cached_property
    def _counts(self) -> dict[str, Count]:
        parts = Counter[str](embeddings=self.embeddings, head=self.head)
        parts.update(norms=self.norms, other=self.other + self.beside)
        idle = Counter[str](other=self.beside)
        for layer, many in self.kinds.items():
            moe = layer.feed_forward
            idle["experts"] += many * (moe.experts - moe.top_k) * moe.expert
            parts.update({part: many * held for part, held in parts_of(layer).items()})
        return {part: Count(parts[part], parts[part] - idle[part]) for part in PARTS if parts[part]}


def parameters(shape: Shape) -> Mapping[str, Count]:
    """Parameters by part. Active is all but the experts that a token is not sent to."""
    return shape._counts


def total(shape: Shape) -> Count:
    """Parameters in all."""
    counts = parameters(shape).values()
    return Count(sum(count.total for count in counts), sum(count.active for count in counts))


def rival(shape: Shape, *, memory: bool) -> Shape:
    """The dense model of the same make that competes with an MoE.

    As many parameters as one token uses (equal compute), or with `memory` as many as all its
    experts have (equal memory); the router goes.
    """
    what = "all its parameters" if memory else "its active parameters"
    dense = {layer: _dense(layer, memory) for layer in shape.kinds}
    return replace(
        shape,
        name=f"dense, {what}",
        layers=tuple(dense[layer] for layer in shape.layers),
        encoder=tuple(dense[layer] for layer in shape.encoder),
        stored=None,
        notes=(),
    )


def _dense(layer: Layer, memory: bool) -> Layer:
    moe = layer.feed_forward
    if not moe.experts:
        return layer
    times = moe.experts if memory else moe.top_k
    dense = FeedForward(
        dense=times * moe.expert + moe.shared, width=times * moe.expert_width + moe.width
    )
    return replace(layer, feed_forward=dense)


def parts_of(layer: Layer) -> dict[str, int]:
    """All parameters of one layer by part."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return {
        "attention": attention.weights,
        "norms": layer.norms + attention.norms,
        "router": feed_forward.router,
        "experts": feed_forward.experts * feed_forward.expert,
        "shared experts": feed_forward.shared,
        "dense layers": feed_forward.dense,
        "other": layer.other,
    }
