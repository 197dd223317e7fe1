"""Scores: what a router makes of its logits before it chooses. Pure functions, all in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Probabilities in float32: (tokens, experts)."""
    return logits.float().softmax(dim=-1)


def sigmoid(logits: Tensor) -> Tensor:
    """Each expert's affinity by itself, in float32: (tokens, experts)."""
    return logits.float().sigmoid()


def sqrtsoftplus(logits: Tensor) -> Tensor:
    """The root of each logit's softplus, in float32: (tokens, experts)."""
    return F.softplus(logits.float()).sqrt()


def in_best_groups(
    scores: Tensor, num_groups: int, topk_groups: int, *, best: int, closed: float
) -> Tensor:
    """Scores with `closed` written over all but the topk_groups best groups of experts.

    A group is worth the sum of its `best` highest scores.
    """
    if num_groups == 1:
        return scores
    grouped = scores.unflatten(-1, (num_groups, -1))  # (tokens, groups, experts of a group)
    worth = grouped.topk(best, dim=-1).values.sum(dim=-1)  # (tokens, groups)
    chosen = worth.topk(topk_groups, dim=-1, sorted=False).indices
    is_open = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, chosen, True)
    return grouped.masked_fill(~is_open.unsqueeze(-1), closed).flatten(1)


def near_the_best(logits: Tensor, scale: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The best expert of each token, and its share among those nearly as good: (tokens, 1) each.

    logits: (tokens, experts), -inf where an expert is out. scale: (tokens, experts), what
    distances from the best logit are measured by; more than 2 x tolerance of it is too far.
    """
    best, expert = logits.max(dim=-1, keepdim=True)
    far = (best - logits) / scale.abs().clamp(min=best) > 2 * tolerance
    return expert, logits.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, expert)
