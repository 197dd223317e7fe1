"""A look at a finished model: how its routers treat some text, and how far that is from another's.

The model need not have been trained here. The report has the form of a run's (history.py), with
one step only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.attach import attach
from expertly.models.loading import Model
from expertly.watch.alarms import Alarms
from expertly.watch.health import Watch
from expertly.watch.history import report
from expertly.watch.snapshots import shares, snapshot
from expertly.watch.stats import LayerCounts, divergence, overlap, watch_set

_ROWS = 4  # at once: enough to keep a processor busy, little memory

Say = Callable[[str], None]


@dataclass(frozen=True)
class Look:
    """What a model's routers did with the rows of each domain."""

    counts: dict[str, LayerCounts]  # by domain
    norms: Tensor  # (layers, experts), mean over the domains in which an expert had tokens
    chosen: Tensor  # (layers, tokens, top_k), experts of every token in order
    top_k: int

    @property
    def total(self) -> LayerCounts:
        """The counts of all domains together."""
        return LayerCounts(*(sum(each) for each in zip(*self.counts.values(), strict=True)))


@torch.no_grad()
def look(model: Model, rows: Mapping[str, Tensor], say: Say) -> Look:
    """Run the rows (rows, seq) of each domain through a model, and count what its routers do.

    Raises E305 for a model without an MoE layer, E306 for an unknown family.
    """
    counts, norms, chosen = {}, [], []
    with Watch(model) as health, attach(model) as attachment:
        for domain, ids in rows.items():
            for batch in ids.split(_ROWS):
                model(batch.to(model.device), use_cache=False)
                made = [decision.chosen.experts for decision in attachment.decisions]
                chosen.append(torch.stack(made).to(torch.int16).cpu())
            health.read()
            assert health.counts is not None
            counts[domain] = health.counts
            norms.append(health.norms)
            say(f"{domain}: {ids.numel():,} tokens")
    known = torch.stack([each for each in norms if each is not None])
    return Look(counts, known.nanmean(dim=0), torch.cat(chosen, dim=1), chosen[0].shape[-1])


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


def drift(seen: Look, reference: Look, name: str) -> dict[str, Any]:
    """How alike two models route the same rows, per layer. Raises E305 for unlike models."""
    here, there = seen.total.load, reference.total.load
    if here.shape != there.shape or seen.chosen.shape[1] != reference.chosen.shape[1]:
        why = f"has {_size(there)}, the model {_size(here)}"
        fix = "name the model that it was made from"
        raise ExpertlyError("E305", f"reference {name}", why, fix=fix)
    valid = torch.ones(seen.chosen.shape[1], dtype=torch.bool)
    alike = overlap(seen.chosen, reference.chosen, valid)
    return {
        "reference": name,
        "overlap": [round(value, 4) for value in alike.tolist()],
        "divergence": [round(value, 4) for value in divergence(here, there).tolist()],
    }


def _size(load: Tensor) -> str:
    layers, experts = load.shape
    return f"{layers} MoE layers of {experts} experts"
