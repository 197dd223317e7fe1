"""Losses that keep a router healthy. Each takes what a router said and returns a plain scalar.

They are sums over tokens divided by totals that the caller passes, so that micro-batches add up
to exactly the loss of the whole batch. Coefficients are the caller's, visible where they are used.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expertly.moe.routing import ROUTERS, Routing, Tokens, tokens_per_expert


class Totals(NamedTuple):
    """What the whole batch of one optimizer step holds, over all its micro-batches."""

    tokens: int  # valid ones
    sequences: int


def count(tokens: Tokens) -> Totals:
    """The totals of one micro-batch."""
    sequences = tokens.sequence_id[tokens.valid].unique()
    return Totals(int(tokens.valid.sum()), len(sequences))


def probabilities(logits: Tensor, router: str) -> Tensor:
    """The router's scores as shares of 1: (tokens, experts), float32.

    A softmax sums to 1 already; sigmoid affinities are divided by their sum (DeepSeek-V3, eq. 20).
    """
    scores = ROUTERS[router].score(logits)
    if ROUTERS[router].sums_to_one:
        return scores
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def load_balancing_loss(probs: Tensor, valid: Tensor, share: Tensor, totals: Totals) -> Tensor:
    """Switch Transformer eq. 4-6 for one layer, on Hugging Face's scale.

    top_k when tokens spread evenly, the number of experts when all choose the same ones.
    probs: (tokens, experts) of this micro-batch; valid: (tokens,); share: (experts,) assignments
    per valid token, which sum to top_k. Taken over the whole batch (global scope; Qwen, "Demons
    in the Detail") the loss does not depend on the split; taken over the micro-batch it does.
    """
    mean_prob = (probs * valid.unsqueeze(-1)).sum(dim=0) / max(totals.tokens, 1)
    return imbalance(share, mean_prob)


def imbalance(share: Tensor, mean_prob: Tensor) -> Tensor:
    """Experts x the dot product of two loads (..., experts): assignments and probability per token.

    The one formula of the load balancing loss, for those who have the two numbers.
    """
    return share.shape[-1] * (share * mean_prob).sum(dim=-1)


def sequence_balancing_loss(
    routing: Routing, probs: Tensor, tokens: Tokens, totals: Totals
) -> Tensor:
    """The same loss per sequence, averaged over sequences (DeepSeek-V3 eq. 17-20, times top_k).

    A sequence must lie in one micro-batch, whole. On the scale of load_balancing_loss. It counts
    the top_k of `probs`, as eq. 18 does: the choice without bias and without limit on groups.
    """
    num_experts = probs.shape[-1]
    preferred = probs.topk(routing.experts.shape[-1], dim=-1).indices
    _, row = tokens.sequence_id.unique(return_inverse=True)  # (tokens,)
    sequences = int(row.max()) + 1
    valid = tokens.valid.float()
    length = valid.new_zeros(sequences).index_add_(0, row, valid).clamp(min=1).unsqueeze(-1)
    chosen = torch.zeros_like(probs).scatter_(1, preferred, 1.0)
    empty = probs.new_zeros(sequences, num_experts)
    share = empty.index_add(0, row, chosen * valid.unsqueeze(-1)) / length
    mean_prob = empty.index_add(0, row, probs * valid.unsqueeze(-1)) / length
    return num_experts * (share * mean_prob).sum() / max(totals.sequences, 1)


def z_loss(logits: Tensor, valid: Tensor, totals: Totals) -> Tensor:
    """ST-MoE eq. 5 for one layer: keeps logits small, so that softmax stays well-behaved."""
    return (squared_log_z(logits) * valid).sum() / max(totals.tokens, 1)


def squared_log_z(logits: Tensor) -> Tensor:
    """Each token's part of the z-loss, in float32: logsumexp^2, (tokens,)."""
    return logits.float().logsumexp(dim=-1).square()


def balance_counts(routing: Routing, valid: Tensor) -> Tensor:
    """Assignments per expert that the balance losses look at: (experts,), float32.

    Pass the router's own choice, before capacity: a capped load would hide a collapse.
    """
    return tokens_per_expert(routing, valid).float()
