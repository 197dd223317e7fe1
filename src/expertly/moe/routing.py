"""Routing: which experts see which token, and with what weight.

Every router is a pure function of the router logits `(tokens, experts)` and returns a Routing.
It counts nothing, draws nothing and learns nothing: randomness comes in as an argument, counting
belongs to expertly.watch, the bias moves in expertly.moe.balance. All of it runs in float32.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.moe.scores import in_best_groups, near_the_best, sigmoid, softmax, sqrtsoftplus


class Routing(NamedTuple):
    """What a router decided for one batch of tokens, in Hugging Face's order."""

    logits: Tensor  # (tokens, experts), before any softmax
    weights: Tensor  # (tokens, top_k), what each chosen expert's output is multiplied by
    experts: Tensor  # (tokens, top_k), int64 expert ids
    kept: Tensor | None = None  # (tokens, top_k) bool; None: nothing was dropped


class Tokens(NamedTuple):
    """What a flat batch of tokens no longer says by itself."""

    valid: Tensor  # (tokens,) bool, False for padding
    sequence_id: Tensor  # (tokens,) int64, which sequence a token belongs to


class Router(NamedTuple):
    """A routing rule, and every fact about it that others must know."""

    route: Callable[..., Routing]  # (logits, top_k, **options) -> Routing
    score: Callable[[Tensor], Tensor]  # logits (tokens, experts) -> scores of the same shape
    sums_to_one: bool = True  # a token's scores do, so they are probabilities
    top_k: int | None = None  # the only one it can do; None: any
    biased: bool = False  # its route takes bias: (experts,), which steers the choice only
    draws: bool = False  # its route takes draw: (tokens,) from U(0, 1), in training only
    causal: bool = True  # no token's experts depend on later tokens
    smallest_group: int = 1  # how many experts each of several groups must have
    plain: tuple[str, Mapping[str, Any]] | None = None  # the rule it is at inference, and options


def tokens_per_expert(routing: Routing, valid: Tensor | None = None) -> Tensor:
    """How many assignments each expert received: (experts,), int64.

    Dropped assignments don't count, nor do those of tokens that are not `valid` (tokens,).
    Not bincount: its output shape depends on the data, which breaks torch.compile.
    """
    slots = routing.experts.flatten()
    counted = torch.ones_like(routing.experts, dtype=torch.bool)
    if routing.kept is not None:
        counted = counted & routing.kept
    if valid is not None:
        counted = counted & valid.unsqueeze(-1)
    zeros = slots.new_zeros(routing.logits.shape[-1])
    return zeros.scatter_add_(0, slots, counted.flatten().long())


def drop(routing: Routing, kept: Tensor) -> Routing:
    """Give the assignments outside `kept` (tokens, top_k) weight 0; the others stay as they are."""
    if routing.kept is not None:
        kept = kept & routing.kept
    return routing._replace(weights=routing.weights.where(kept, 0.0), kept=kept)


def jitter(x: Tensor, noise: float) -> Tensor:
    """The router's input (tokens, dim) times U(1 - noise, 1 + noise), in float32.

    Switch Transformer, section 2.2: the text multiplies the input; its printed code adds to logits.
    """
    x = x.float()  # bfloat16 has four values from 0.99 to 1.01
    return x * torch.empty_like(x).uniform_(1.0 - noise, 1.0 + noise)


# --- Rules -------------------------------------------------------------------------------------


def softmax_topk(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    num_groups: int = 1,
    topk_groups: int = 1,
    best: int = 1,
    scale: float = 1.0,
    ordered: bool = True,
) -> Routing:
    """Softmax over all experts, keep the top k.

    Mixtral (renormalised), OLMoE (not), Qwen3-MoE (its config says); with groups and a scale
    DeepSeek-V2, whose best groups are those with the highest single score (section 2.2.2).
    best: how many of its highest scores a group is worth together; Mistral 4 adds two.
    ordered: best expert first; False leaves it open, as DeepSeek's code does: rounding shows it.
    """
    probs = softmax(logits)
    open_probs = in_best_groups(probs, num_groups, topk_groups, best=best, closed=0.0)
    weights, experts = open_probs.topk(top_k, dim=-1, sorted=ordered)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, weights if scale == 1.0 else weights * scale, experts)


def topk_softmax(logits: Tensor, top_k: int) -> Routing:
    """Top k of the logits, then softmax over the chosen: gpt-oss (its bias is in the logits)."""
    chosen, experts = logits.float().topk(top_k, dim=-1)
    return Routing(logits, chosen.softmax(dim=-1), experts)


def topk_sigmoid(
    logits: Tensor, top_k: int, *, renormalize: bool = False, of_all: bool = True
) -> Routing:
    """Top k of the logits, each weighted by its own sigmoid: Llama 4, Cohere 2 (renormalised).

    of_all: take the sigmoid of every logit, as Llama 4's code does; False: of the chosen only, as
    Cohere's does: rounding shows it.
    """
    chosen, experts = logits.float().topk(top_k, dim=-1)
    weights = sigmoid(logits).gather(-1, experts) if of_all else sigmoid(chosen)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, weights, experts)


def sigmoid_topk(logits: Tensor, top_k: int, *, renormalize: bool = True) -> Routing:
    """Top k of the sigmoids: Flint."""
    weights, experts = sigmoid(logits).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, weights, experts)


def sparsemixer(logits: Tensor, top_k: int = 2, *, tolerance: float = 0.01) -> Routing:
    """Phi-MoE: the two best experts, each weighted by its share among those nearly as good.

    SparseMixer-v2 (Liu et al. 2024) as inference computes it. Training there draws the experts and
    estimates their gradient; here it takes the best ones too. tolerance: its jitter_eps.
    """
    logits = logits.float()
    first, weight = near_the_best(logits, logits, tolerance)
    others = logits.scatter(-1, first, -torch.inf)
    second, other_weight = near_the_best(others, logits, tolerance)
    weights, experts = torch.cat([weight, other_weight], -1), torch.cat([first, second], -1)
    return Routing(logits, weights, experts)


def switch_top1(logits: Tensor, top_k: int = 1) -> Routing:
    """One expert, weighted by its probability as it is (Switch Transformer, section 2.1)."""
    return softmax_topk(logits, top_k, renormalize=False)


def gshard_top2(logits: Tensor, top_k: int = 2, *, draw: Tensor | None = None) -> Routing:
    """Two experts; the second is used with probability min(1, 2 x its weight).

    GShard, section 2.2. draw: (tokens,) from U(0, 1); without it, as in evaluation, the second
    expert is always used.
    """
    routing = softmax_topk(logits, top_k)
    if draw is None:
        return routing
    kept = torch.ones_like(routing.experts, dtype=torch.bool)
    kept[:, 1] = 2 * routing.weights[:, 1] > draw
    return drop(routing, kept)


def biased_sigmoid_topk(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor,
    renormalize: bool = True,
    num_groups: int = 1,
    topk_groups: int = 1,
    closed: float = -math.inf,
    epsilon: float = 1e-20,
    scale: float = 1.0,
    ordered: bool = False,
) -> Routing:
    """DeepSeek-V3, section 2.1.2: the bias (experts,) steers the choice, never the weight.

    The best groups are those whose two highest biased scores have the largest sum. closed: what
    experts of the other groups score. epsilon: added to the sum that weights are divided by.
    ordered: as in softmax_topk.
    """
    scores = sigmoid(logits)
    choice = in_best_groups(scores + bias, num_groups, topk_groups, best=2, closed=closed)
    experts = choice.topk(top_k, dim=-1, sorted=ordered).indices
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + epsilon)
    return Routing(logits, weights * scale, experts)


def biased_sqrtsoftplus_topk(
    logits: Tensor, top_k: int, *, bias: Tensor, scale: float = 1.0
) -> Routing:
    """DeepSeek-V4: scores are sqrt(softplus(logits)), a bias (experts,) for the choice only."""
    scores = sqrtsoftplus(logits)
    experts = (scores + bias).topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, experts)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(logits, weights * scale, experts)


def biased_topk_sigmoid(
    logits: Tensor, top_k: int, *, bias: Tensor, renormalize: bool = False
) -> Routing:
    """Kolibri: the bias (experts,) is added to the logits for the choice; weights are sigmoids."""
    experts = (logits + bias).topk(top_k, dim=-1).indices
    weights = sigmoid(logits.gather(-1, experts))
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, weights, experts)


def biased_softmax_topk(
    logits: Tensor, top_k: int, *, bias: Tensor, minimum: float = 1e-12
) -> Routing:
    """Ernie 4.5: softmax scores, a bias (experts,) for the choice only, weights sum to 1.

    minimum: a floor under the sum that weights are divided by (Ernie's moe_norm_min).
    """
    probs = softmax(logits)
    experts = (probs + bias).topk(top_k, dim=-1).indices
    weights = probs.gather(-1, experts)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=minimum)
    return Routing(logits, weights, experts)


def expert_choice(logits: Tensor, top_k: int) -> Routing:
    """Each expert takes its best tokens x top_k / experts tokens (Zhou et al. 2022, section 3.2).

    A token's experts vary in number: rows are padded to the largest, with kept=False. The choice
    looks at every token of the batch, later ones too, so causal models must not use it.
    """
    tokens, experts = logits.shape
    each = max(1, tokens * top_k // experts)
    probs = softmax(logits)
    taken = torch.zeros_like(probs, dtype=torch.bool)
    taken.scatter_(0, probs.topk(each, dim=0).indices, True)
    width = max(1, int(taken.sum(dim=-1).max()))
    order = probs.where(taken, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :width]
    return drop(Routing(logits, probs.gather(-1, order), order), taken.gather(-1, order))


ROUTERS = {
    "softmax_topk": Router(softmax_topk, softmax),
    "topk_softmax": Router(topk_softmax, softmax),
    "topk_sigmoid": Router(topk_sigmoid, sigmoid, sums_to_one=False),
    "sigmoid_topk": Router(sigmoid_topk, sigmoid, sums_to_one=False),
    "sparsemixer": Router(sparsemixer, softmax, top_k=2),
    "switch_top1": Router(
        switch_top1, softmax, top_k=1, plain=("softmax_topk", {"renormalize": False})
    ),
    "gshard_top2": Router(
        gshard_top2, softmax, top_k=2, draws=True, plain=("softmax_topk", {"renormalize": True})
    ),
    "biased_sigmoid_topk": Router(
        biased_sigmoid_topk, sigmoid, sums_to_one=False, biased=True, smallest_group=2
    ),
    "biased_sqrtsoftplus_topk": Router(
        biased_sqrtsoftplus_topk, sqrtsoftplus, sums_to_one=False, biased=True
    ),
    "biased_topk_sigmoid": Router(biased_topk_sigmoid, sigmoid, sums_to_one=False, biased=True),
    "biased_softmax_topk": Router(biased_softmax_topk, softmax, biased=True),
    "expert_choice": Router(expert_choice, softmax, causal=False),
}
