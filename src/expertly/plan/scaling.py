"""What loss a model of this size would reach: the joint scaling law of dense models and MoEs.

Ludziejewski et al. 2025, "Joint MoE Scaling Laws" (arXiv 2502.05172), Eq. 6 and Tables 3-4:
    loss = a E'^delta N^(alpha + gamma ln E') + b E'^omega D^(beta + zeta ln E') + c
N: active parameters, embeddings and head included. D: training tokens. E: experts, 1 for a dense
model, which E' makes smooth. Training takes 6 N D FLOPs. Losses are in nats on the paper's data
and tokenizer: compare them with each other, never with those of another law or model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, inf, log
from typing import NamedTuple

from expertly.errors import ExpertlyError
from expertly.plan.shape import Shape, total

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
E_START, E_MAX, FLOOR = 2.0732, 290.4521, 1.3637

# what the law was fitted on: above 280 runs
MOST_EXPERTS = 32
MOST_ACTIVE, MOST_TOTAL = 2.7e9, 5e9
TOKENS_PER_ACTIVE = (0.4, 75.0)


class Optimum(NamedTuple):
    """The best that a budget buys: loss in nats, active parameters, tokens."""

    loss: float
    active: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A model trained on `tokens`, beside dense models trained with the same FLOPs; losses in nats.

    The dense model of equal compute has as many parameters as one token uses here, and sees as many
    tokens. That of equal memory has all of them, and so sees fewer: `dense_tokens`.
    """

    experts: float  # the law's E: how many times more feed-forward parameters there are than used
    tokens: float
    flops: float
    moe: float
    dense_equal_compute: float
    dense_equal_memory: float
    dense_tokens: float
    dense_equal_loss: float  # parameters of a dense model as good after the same tokens
    saving: float  # how many times the FLOPs a dense model needs, both at their best sizes
    beyond: tuple[str, ...]  # where this model lies outside of what the law was fitted on


def loss(active: float, tokens: float, experts: float) -> float:
    """The loss in nats; `active` in parameters, `experts` = 1 for a dense model.

    Raises E202 for sizes that are not above 0, and for less than one expert.
    """
    _check(experts, active=active, tokens=tokens)
    m, mu, n, nu = reduced(experts)
    return m * active**mu + n * tokens**nu + FLOOR


def optimum(flops: float, experts: float) -> Optimum:
    """The best model for a training budget of `flops` = 6 N D.

    In closed form, from setting the derivative of m N^mu + n (flops / 6 N)^nu to 0. Raises E202.
    """
    _check(experts, flops=flops)
    m, mu, n, nu = reduced(experts)
    active = exp((log(n * nu / (m * mu)) + nu * log(flops / 6)) / (mu + nu))
    tokens = flops / 6 / active
    return Optimum(loss(active, tokens, experts), active, tokens)


def saving(flops: float, experts: float) -> float:
    """How many times fewer FLOPs reach the loss that `flops` buy in a dense model.

    Both at their best sizes: there the two terms of the loss are as nu to mu, so that the loss
    gives N and D at once. Raises E202.
    """
    above = optimum(flops, 1).loss - FLOOR
    _check(experts)
    m, mu, n, nu = reduced(experts)
    active = exp(log(above * nu / (m * (mu + nu))) / mu)
    tokens = exp(log(above * mu / (n * (mu + nu))) / nu)
    return flops / (6 * active * tokens)


def equal_dense(active: float, tokens: float, experts: float) -> float:
    """Parameters of the dense model that has the same loss after the same tokens. Raises E202.

    inf where more data, not more parameters, is what a dense model lacks.
    """
    m, mu, n, nu = reduced(1)
    left = loss(active, tokens, experts) - FLOOR - n * tokens**nu
    return exp(log(left / m) / mu) if left > 0 else inf


def reduced(experts: float) -> tuple[float, float, float, float]:
    """m, mu, n, nu of the law for one E: m N^mu + n D^nu + c (the paper's Table 4)."""
    smooth = 1 / (1 / (experts - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)
    rate = log(smooth)
    return A * smooth**DELTA, ALPHA + GAMMA * rate, B * smooth**OMEGA, BETA + ZETA * rate


def expansion(shape: Shape) -> float:
    """The law's E: all feed-forward parameters over those that a token uses, of all layers."""
    blocks = [layer.feed_forward for layer in shape.blocks]
    always = sum(block.dense + block.shared for block in blocks)
    used = always + sum(block.top_k * block.expert for block in blocks)
    held = always + sum(block.experts * block.expert for block in blocks)
    return held / used if used else 1.0


def estimate(shape: Shape, tokens: float) -> Estimate:
    """What the law says of a model trained on `tokens` from scratch, and of its dense rivals.

    Raises E202 for tokens that are not above 0.
    """
    count, experts = total(shape), expansion(shape)
    _check(experts, tokens=tokens)
    flops = 6 * count.active * tokens
    fewer = flops / 6 / count.total
    return Estimate(
        experts=experts,
        tokens=tokens,
        flops=flops,
        moe=loss(count.active, tokens, experts),
        dense_equal_compute=loss(count.active, tokens, 1),
        dense_equal_memory=loss(count.total, fewer, 1),
        dense_tokens=fewer,
        dense_equal_loss=equal_dense(count.active, tokens, experts),
        saving=saving(flops, experts),
        beyond=tuple(_beyond(shape, experts, tokens)),
    )


def _beyond(shape: Shape, experts: float, tokens: float) -> Iterator[str]:
    count, few, many = total(shape), *TOKENS_PER_ACTIVE
    each = tokens / count.active
    if experts > MOST_EXPERTS:
        yield f"E = {experts:.1f}: the law was fitted up to {MOST_EXPERTS}"
    yield from _unlike(shape)
    if count.active > MOST_ACTIVE or count.total > MOST_TOTAL:
        yield (
            f"{count.active / 1e9:.3g} B active of {count.total / 1e9:.3g} B parameters: the law "
            f"was fitted up to {MOST_ACTIVE / 1e9:g} B of {MOST_TOTAL / 1e9:g} B"
        )
    if not few <= each <= many:
        yield f"{each:.3g} tokens per active parameter: the law was fitted on {few:g} to {many:g}"


def _unlike(shape: Shape) -> Iterator[str]:
    moes = [layer.feed_forward for layer in shape.moe_layers]
    top_k = max((moe.top_k for moe in moes), default=1)
    if top_k > 1:
        yield f"a token goes to {top_k} experts: the law knows one, as large as the dense network"
    if any(moe.shared for moe in moes):
        yield "shared experts: the law's models have none"
    if moes and len(moes) < len(shape.blocks):
        yield f"experts in {len(moes)} of {len(shape.blocks)} layers: the law has them in all"
    if shape.encoder:
        yield "an encoder: the law's models are decoders"


def _check(experts: float, **sizes: float) -> None:
    for name, value in sizes.items():
        if not 0 < value < inf:
            raise _outside(f"{name} = {value:g}", "must be above 0")
    if not 1 <= experts < inf:
        raise _outside(f"experts = {experts:g}", "must be at least 1")


def _outside(what: str, why: str) -> ExpertlyError:
    return ExpertlyError("E202", f"scaling law: {what}", why, fix="give a number that can be")
