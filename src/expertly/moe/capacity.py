"""Capacity: how many assignments an expert takes, in which order, and what happens to the rest."""

import math
from typing import Literal

import torch
from torch import Tensor

from expertly.moe.routing import Routing, drop, tokens_per_expert

Overflow = Literal["drop", "reroute"]
# token: the batch's token order, each token's choices together (Switch Transformer)
# choice: all first choices, then all second ones (GShard)
# weight: the largest weight first, so that the least certain assignments overflow (DeepSeek-V2)
Fill = Literal["token", "choice", "weight"]


def expert_capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """How many assignments one expert takes: its even share times the factor, at least 1."""
    return max(1, math.floor(tokens * top_k / num_experts * capacity_factor))


def limit(
    routing: Routing,
    scores: Tensor,
    valid: Tensor,
    *,
    capacity_factor: float,
    overflow: Overflow = "drop",
    fill: Fill = "choice",
) -> Routing:
    """Keep each expert within its capacity: drop the overflow, or reroute it.

    scores: (tokens, experts), the router's, before the choice. valid: (tokens,) bool; padding
    takes no room and loses its assignments. Capacity counts valid tokens only.
    """
    top_k, num_experts = routing.experts.shape[-1], scores.shape[-1]
    capacity = expert_capacity(int(valid.sum()), top_k, num_experts, capacity_factor)
    wanted = valid.unsqueeze(-1).expand_as(routing.experts)
    wanted = wanted if routing.kept is None else wanted & routing.kept
    position = fill_positions(routing, wanted, fill)
    limited = drop(routing, wanted & (position < capacity))
    if overflow == "drop":
        return limited
    return _reroute(limited, routing, scores, wanted, capacity)


def fill_positions(routing: Routing, wanted: Tensor, fill: Fill) -> Tensor:
    """Each wanted assignment's place in its expert's queue, from 0: (tokens, top_k)."""
    order = _fill_order(routing.weights.detach(), fill)  # (assignments,)
    queue = _places(routing.experts.flatten()[order], wanted.flatten()[order])
    return torch.empty_like(queue).scatter_(0, order, queue).view_as(routing.experts)


def _fill_order(weights: Tensor, fill: Fill) -> Tensor:
    """Flat assignment numbers in the order in which they ask for room: (assignments,)."""
    tokens, top_k = weights.shape
    if fill == "weight":
        return weights.flatten().argsort(descending=True, stable=True)
    ranked = weights.argsort(dim=-1, descending=True, stable=True)  # best choice first
    flat = ranked + top_k * torch.arange(tokens, device=weights.device).unsqueeze(-1)
    return (flat.T if fill == "choice" else flat).flatten()


def _places(experts: Tensor, wanted: Tensor) -> Tensor:
    """For a queue (assignments,): how many wanted ones of the same expert stand before each."""
    by_expert = experts.argsort(stable=True)
    asks = wanted[by_expert].long()
    before = asks.cumsum(0) - asks  # wanted ones before it, over all experts
    first = torch.searchsorted(experts[by_expert], experts[by_expert])  # its expert's first slot
    return torch.empty_like(before).scatter_(0, by_expert, before - before[first])


def _reroute(
    limited: Routing, chosen: Routing, scores: Tensor, wanted: Tensor, capacity: int
) -> Routing:
    """Send overflow to each token's next-best expert with room, until none is left to try.

    Switch Transformer, appendix B (no token left behind). The new gate is the token's own next
    score, scaled as its first choices were.
    """
    factor = chosen.weights.sum(-1) / scores.gather(-1, chosen.experts).sum(-1)  # (tokens,)
    scaled = scores * factor.unsqueeze(-1)
    weights, experts = limited.weights.clone(), limited.experts.clone()
    kept = wanted.clone() if limited.kept is None else limited.kept.clone()
    tried = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen.experts, True)
    for _ in range(scores.shape[-1]):
        load = tokens_per_expert(Routing(scores, weights, experts, kept))
        for slot in range(experts.shape[-1]):
            lost = (wanted[:, slot] & ~kept[:, slot]).nonzero().squeeze(-1)
            closed = tried[lost] | (load >= capacity)
            lost, closed = lost[~closed.all(-1)], closed[~closed.all(-1)]
            if len(lost) == 0:
                continue
            new = scores[lost].detach().masked_fill(closed, -torch.inf).argmax(dim=-1)
            fits = load[new] + _places(new, torch.ones_like(new, dtype=torch.bool)) < capacity
            tried[lost, new] = True
            lost, new = lost[fits], new[fits]
            experts[lost, slot], kept[lost, slot] = new, True
            weights[lost, slot] = scaled[lost, new]
            load = load + torch.zeros_like(load).scatter_add_(0, new, torch.ones_like(new))
    return Routing(limited.logits, weights, experts, kept)
