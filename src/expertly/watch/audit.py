"""A look at a finished model: how its routers treat some text.

The model need not have been trained here. The report has the form of a run's (history.py), with
one step only; how far it is from another's is said in drift.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertly.data.batches import next_tokens
from expertly.models.attach import attach
from expertly.models.loading import Model
from expertly.watch.alarms import Alarms
from expertly.watch.health import Watch
from expertly.watch.history import report
from expertly.watch.snapshots import shares, snapshot
from expertly.watch.stats import LayerCounts, watch_set

_ROWS = 4  # at once: enough to keep a processor busy, little memory

Say = Callable[[str], None]


class Text(NamedTuple):
    """Rows of tokens to read, (rows, seq) each."""

    ids: Tensor
    learnt: Tensor | None = None  # tokens whose loss counts; None: all
    position_ids: Tensor | None = None  # from 0 in each of the examples that share a row


@dataclass(frozen=True)
class Look:
    """What a model's routers did with the rows of each domain."""

    counts: dict[str, LayerCounts]  # by domain
    norms: Tensor  # (layers, experts), mean over the domains in which an expert had tokens
    chosen: dict[str, Tensor]  # by domain (layers, tokens, top_k), of every token in order
    losses: dict[str, float]  # by domain, nats per token
    top_k: int

    @property
    def total(self) -> LayerCounts:
        """The counts of all domains together."""
        return LayerCounts(*(sum(each) for each in zip(*self.counts.values(), strict=True)))


@torch.no_grad()
def look(model: Model, texts: Mapping[str, Text], say: Say) -> Look:
    """Run the text of each domain through a model, and see what its routers do.

    Raises E305 for a model without an MoE layer, E306 for an unknown family.
    """
    counts, norms, chosen, losses = {}, [], {}, {}
    with Watch(model) as health, attach(model) as attachment:
        for domain, text in texts.items():
            parts = []
            lost = torch.zeros(2, dtype=torch.float64)  # summed loss, and tokens that it is of
            for batch in _batches(text):
                places = batch.position_ids
                more = {} if places is None else {"position_ids": places.to(model.device)}
                out = model(batch.ids.to(model.device), use_cache=False, **more)
                lost += _lost(out.logits, batch)
                made = [decision.chosen.experts for decision in attachment.decisions]
                assert attachment.tokens is not None
                parts.append(torch.stack(made)[:, attachment.tokens.valid].to(torch.int16).cpu())
            health.read()
            assert health.counts is not None
            counts[domain], chosen[domain] = health.counts, torch.cat(parts, dim=1)
            losses[domain] = float(lost[0] / lost[1].clamp(min=1))
            norms.append(health.norms)
            say(f"{domain}: {text.ids.numel():,} tokens")
    known = torch.stack([each for each in norms if each is not None])
    top_k = next(iter(chosen.values())).shape[-1]
    return Look(counts, known.nanmean(dim=0), chosen, losses, top_k)


def _batches(text: Text) -> list[Text]:
    """A few rows each."""
    parts = ([None] * len(text.ids) if t is None else t.split(_ROWS) for t in text)
    return [Text(*part) for part in zip(*parts, strict=False)]


def _lost(logits: Tensor, text: Text) -> Tensor:
    """The summed loss of the tokens that count, and how many these are: (2,) float64."""
    labels = next_tokens(text.ids, None, text.learnt, text.position_ids).flatten()
    asked = labels != -100
    wanted = logits.flatten(0, 1)[asked.to(logits.device)].float()
    loss = F.cross_entropy(wanted, labels[asked].to(logits.device), reduction="sum")
    return torch.stack([loss.double().cpu(), asked.sum().double()])


def audit(title: str, config: Mapping[str, Any], seen: Look) -> dict[str, Any]:
    """The report of what was seen of a model. config: the model's."""
    total = seen.total
    layers, experts = total.load.shape
    alarms = Alarms(layers, experts, seen.top_k, window=1)
    metrics: list[dict[str, Any]] = [{"step": 0, "moe": watch_set(total)}]
    for alarm in alarms.add(0, total, seen.norms).raised:
        metrics.append({"step": 0, "alarm": alarm._asdict()})
    tokens = int(total.tokens.max())
    snapshots = [{"step": 0, "tokens": tokens, **snapshot(total, seen.norms)}]
    domains = {name: shares(counts.load) for name, counts in seen.counts.items()}
    return report(title, "model", config, metrics, snapshots, domains)
