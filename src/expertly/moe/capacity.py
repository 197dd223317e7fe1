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
    """How many assignments one expert takes: its even share times the factor, at least 1.

    Rounded up, so that a factor of 1 has room for every assignment whatever the numbers.
    """
    share = tokens * top_k * capacity_factor / num_experts
    return max(1, math.ceil(share - 1e-6))  # 1e-6: what a factor such as 1.1 is off in binary


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
    queue = _queue(routing.weights.detach(), wanted, fill)
    fits = _places(routing.experts.flatten()[queue]) < capacity
    kept = torch.zeros_like(wanted.flatten())
    kept[queue[fits]] = True
    limited = drop(routing, kept.view_as(wanted))
    if overflow == "drop":
        return limited
    gates = _gates(routing, scores, wanted)
    tried = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, routing.experts, wanted)
    return _reroute(limited, queue[~fits], scores.detach(), gates, tried, capacity)


def _queue(weights: Tensor, wanted: Tensor, fill: Fill) -> Tensor:
    """The wanted assignments, as flat (token, k) slots, in the order in which they ask for room."""
    tokens, top_k = weights.shape
    if fill == "weight":
        order = weights.flatten().argsort(descending=True, stable=True)
    else:
        ranked = weights.argsort(dim=-1, descending=True, stable=True)  # best choice first
        slots = ranked + top_k * torch.arange(tokens, device=weights.device).unsqueeze(-1)
        order = (slots.T if fill == "choice" else slots).flatten()
    return order[wanted.flatten()[order]]


def _places(names: Tensor) -> Tensor:
    """How many of the same name stand before each in a queue (assignments,)."""
    by_name = names.argsort(stable=True)
    ordered = names[by_name]
    first = torch.searchsorted(ordered, ordered)  # where its name begins
    place = torch.arange(len(names), device=names.device) - first
    return torch.empty_like(place).scatter_(0, by_name, place)


def _gates(routing: Routing, scores: Tensor, wanted: Tensor) -> Tensor:
    """Every expert's weight for each token, scaled as its choices were: (tokens, experts)."""
    given = (routing.weights * wanted).sum(dim=-1)
    of = (scores.gather(-1, routing.experts) * wanted).sum(dim=-1)  # 0 for padding
    return scores * (given / of.clamp(min=1e-20)).unsqueeze(-1)


def _reroute(
    limited: Routing, queue: Tensor, scores: Tensor, gates: Tensor, tried: Tensor, capacity: int
) -> Routing:
    """Send the overflow `queue` to each token's next-best expert with room, until all are tried.

    Switch Transformer, appendix B (no token left behind). Next-best is by score: a selection bias
    steers first choices only. tried: (tokens, experts), where a token has been; changed in place.
    """
    top_k, num_experts = limited.experts.shape[-1], scores.shape[-1]
    assert limited.kept is not None
    weights, experts, kept = (t.flatten().clone() for t in limited[1:] if t is not None)
    load = tokens_per_expert(limited)
    for _ in range(num_experts):
        token = queue // top_k
        closed = tried[token] | (load >= capacity)
        # one assignment of a token at a time, or two would take the same expert
        turn = ~closed.all(dim=-1) & (_places(token) == 0)
        slot, token, closed = queue[turn], token[turn], closed[turn]
        if len(slot) == 0:
            break
        new = scores[token].masked_fill(closed, -torch.inf).argmax(dim=-1)
        tried[token, new] = True
        fits = load[new] + _places(new) < capacity
        slot, token, new = slot[fits], token[fits], new[fits]
        experts[slot], weights[slot], kept[slot] = new, gates[token, new], True
        load = load.scatter_add(0, new, torch.ones_like(new))
        queue = queue[~kept[queue]]
    shape = limited.experts.shape
    return Routing(limited.logits, weights.view(shape), experts.view(shape), kept.view(shape))
