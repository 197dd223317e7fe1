"""Loss and gradient of one optimizer step, exact however the batch is split into micro-batches.

Cross-entropy is summed over label tokens and divided by those of the whole batch. The router's
losses use load fractions of the whole batch (`scope: global`): with several micro-batches a count
pass without gradients fixes them first. So neither loss nor gradient depends on the split, as long
as nothing draws random numbers (jitter, dropout, gshard_top2) or depends on the micro-batch
(capacity).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertly.data.batches import next_tokens
from expertly.models.attach import Attachment, tokens_of
from expertly.moe.losses import (
    Totals,
    balance_counts,
    count,
    load_balancing_loss,
    probabilities,
    sequence_balancing_loss,
    z_loss,
)
from expertly.moe.policy import Decision
from expertly.moe.routing import Tokens
from expertly.train.config import RouterConfig
from expertly.watch.recorder import Recorder


class MicroBatch(NamedTuple):
    """Rows that go through the model at once."""

    input_ids: Tensor  # (batch, seq)
    attention_mask: Tensor | None = None  # (batch, seq); None: no padding
    learnt: Tensor | None = None  # (batch, seq), tokens that the model learns to write; None: all
    position_ids: Tensor | None = None  # (batch, seq), from 0 in each text of a row

    def labels(self) -> Tensor:
        """The next token at each position, -100 where there is none to learn: (batch, seq)."""
        return next_tokens(*self)


class StepLosses(NamedTuple):
    """One step's losses over its whole batch; the router's without their coefficients."""

    cross_entropy: float
    aux: float
    sequence_aux: float
    z: float


class BatchTotals(NamedTuple):
    """What the micro-batches of one step hold together."""

    totals: Totals
    labels: int  # label tokens
    shares: list[Tensor] | None  # per layer (experts,), assignments per token; None: not known yet


Term = TypeVar("Term", float, Tensor)


def total_loss(
    cross_entropy: Term,
    aux: Term | float = 0.0,
    sequence_aux: Term | float = 0.0,
    z: Term | float = 0.0,
    *,
    router: RouterConfig,
) -> Term:
    """The loss that is differentiated: each router loss with its coefficient, in plain sight."""
    return (
        cross_entropy
        + router.router_aux_loss_coef * aux
        + router.sequence_aux_loss_coef * sequence_aux
        + router.router_z_loss_coef * z
    )


def accumulate(
    model: nn.Module,
    attachment: Attachment | None,
    micro_batches: Sequence[MicroBatch],
    router: RouterConfig,
    recorder: Recorder | None = None,
    autocast: AbstractContextManager | None = None,
) -> StepLosses:
    """Add the gradient of the whole batch to the parameters and return its losses.

    attachment None: a dense model, cross-entropy only. autocast: entered around each forward.
    """
    autocast = autocast or nullcontext()
    batch = _measure(model, attachment, micro_batches, router, autocast)
    running: list[Tensor] = []
    losses = torch.zeros(4)
    for micro in micro_batches:
        with autocast:
            logits = forward(model, micro)
        terms = [cross_entropy(logits, micro) / batch.labels]
        if attachment is not None:
            tokens, decisions = attachment.tokens, attachment.decisions
            assert tokens is not None
            shares = batch.shares or _shares_here(decisions, tokens, router, running)
            terms += _router_terms(decisions, tokens, shares, batch.totals, attachment, router)
            if recorder is not None:
                recorder.add(decisions, attachment.tokens_by_layer)
        total_loss(*terms, router=router).backward()
        losses[: len(terms)] += torch.stack([term.detach() for term in terms]).cpu()
    return StepLosses(*losses.tolist())


def _measure(
    model: nn.Module,
    attachment: Attachment | None,
    micro_batches: Sequence[MicroBatch],
    router: RouterConfig,
    autocast: AbstractContextManager,
) -> BatchTotals:
    """Count the whole batch; and its load fractions, by a forward without gradients, if needed."""
    labels = max(1, sum(int((micro.labels() != -100).sum()) for micro in micro_batches))
    counted = [
        count(tokens_of(m.input_ids, m.attention_mask, m.position_ids)) for m in micro_batches
    ]
    totals = Totals(*(sum(values) for values in zip(*counted, strict=True)))
    split = len(micro_batches) > 1 and router.router_aux_loss_coef > 0
    if attachment is None or not (split and router.exact and router.scope == "global"):
        return BatchTotals(totals, labels, None)
    sums: list[Tensor] = []
    for micro in micro_batches:
        with torch.no_grad(), autocast:
            forward(model, micro)
        assert attachment.tokens is not None
        here = _counts(attachment.decisions, attachment.tokens)
        sums = [a + b for a, b in zip(sums, here, strict=True)] if sums else here
    return BatchTotals(totals, labels, [counts / totals.tokens for counts in sums])


def _shares_here(
    decisions: list[Decision], tokens: Tokens, router: RouterConfig, running: list[Tensor]
) -> list[Tensor]:
    """Load fractions without a count pass: this micro-batch's own, or those of all so far.

    running: per layer the counts so far with the tokens behind them; appended to in global scope.
    """
    counts = torch.stack(_counts(decisions, tokens))  # (layers, experts)
    valid = tokens.valid.sum()
    if router.scope == "global":
        running.append(torch.cat([counts, valid.to(counts).expand(len(counts), 1)], dim=1))
        both = torch.stack(running).sum(dim=0)
        counts, valid = both[:, :-1], both[0, -1]
    return list(counts / valid.clamp(min=1))


def _counts(decisions: list[Decision], tokens: Tokens) -> list[Tensor]:
    return [balance_counts(decision.chosen, tokens.valid) for decision in decisions]


def _router_terms(
    decisions: list[Decision],
    tokens: Tokens,
    shares: list[Tensor],
    totals: Totals,
    attachment: Attachment,
    router: RouterConfig,
) -> list[Tensor]:
    """The router's losses of one micro-batch, each averaged over layers, not yet weighted."""
    aux, sequence_aux, z = [], [], []
    for decision, share in zip(decisions, shares, strict=True):
        chosen = decision.chosen
        probs = probabilities(chosen.logits, attachment.rule)
        aux.append(load_balancing_loss(probs, tokens.valid, share, totals))
        if router.sequence_aux_loss_coef:
            sequence_aux.append(sequence_balancing_loss(chosen, probs, tokens, totals))
        z.append(z_loss(chosen.logits, tokens.valid, totals))
    nothing = [aux[0].new_zeros(())]
    return [torch.stack(terms or nothing).mean() for terms in (aux, sequence_aux, z)]


def forward(model: nn.Module, micro: MicroBatch) -> Tensor:
    """The logits (batch, seq, vocab); without the cache that every model fills by default."""
    places = {} if micro.position_ids is None else {"position_ids": micro.position_ids}
    mask = micro.attention_mask
    return model(micro.input_ids, attention_mask=mask, use_cache=False, **places).logits


def cross_entropy(logits: Tensor, micro: MicroBatch) -> Tensor:
    """Summed over label tokens, in float32."""
    labels = micro.labels().flatten().to(logits.device)
    return F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")
