"""Held-out loss, per domain and over all."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from expertly.data.batches import Batch
from expertly.models.attach import Attachment
from expertly.moe.routing import tokens_per_expert
from expertly.train.step import MicroBatch, cross_entropy, forward


class HeldOut(NamedTuple):
    """Cross-entropy in nats per token on held-out text."""

    loss: float  # over all held-out tokens
    domains: dict[str, float]
    loads: dict[str, Tensor]  # (layers, experts) tokens per expert, by domain; dense models: none


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    autocast: AbstractContextManager,
    attachment: Attachment | None = None,
) -> HeldOut:
    """Evaluate on the same rows each time, and leave the model as it was.

    names: a domain's name by its index in the batches. attachment: of an MoE model, so that its
    routers' decisions are counted.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(len(names), 2, dtype=torch.float64)  # loss and label tokens per domain
    loads: dict[str, Tensor] = {}
    for batch in batches:
        micro = to_micro(batch, device)
        with autocast:
            logits = forward(model, micro)
        labels = (micro.labels() != -100).sum()
        loss = cross_entropy(logits, micro)
        domain = int(batch.domains[0])
        sums[domain] += torch.stack([loss.double(), labels.double()]).cpu()
        if attachment is not None:
            loads[names[domain]] = loads.get(names[domain], 0.0) + _load(attachment)
    model.train(training)
    means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    used = [index for index in range(len(names)) if sums[index, 1] > 0]
    overall = float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))
    return HeldOut(overall, {names[index]: means[index] for index in used}, loads)


def _load(attachment: Attachment) -> Tensor:
    """Tokens per expert in the latest forward: (layers, experts), on the CPU."""
    assert attachment.tokens is not None
    valid = attachment.tokens.valid
    loads = [tokens_per_expert(made.served, valid) for made in attachment.decisions]
    return torch.stack(loads).double().cpu()


def to_micro(batch: Batch, device: torch.device) -> MicroBatch:
    """A data batch on the model's device; a mask of ones alone is left out, which is faster."""
    mask = batch.attention_mask
    if mask is not None and bool(mask.all()):
        mask = None
    others = (mask, batch.learnt, batch.position_ids)
    there = (None if each is None else each.to(device) for each in others)
    return MicroBatch(batch.input_ids.to(device), *there)
