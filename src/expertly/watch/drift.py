"""How far a model has drifted from another on the same text: routing, and what was forgotten."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.loading import Model
from expertly.watch.audit import Look, Say, Text, audit, look
from expertly.watch.records import finite
from expertly.watch.stats import LayerCounts, divergence, layer_stats, overlap

Open = Callable[[], Model]


def drift_report(
    title: str,
    config: Mapping[str, Any],
    texts: Mapping[str, Text],
    opens: tuple[Open, Open],
    reference: str,
    say: Say,
) -> dict[str, Any]:
    """The report of a model (audit.py), with its drift from a reference.

    opens: the model and the reference, of which one at a time is in memory. config: the model's.
    Raises E305 for unlike models.
    """
    seen = look(opens[0](), texts, say)
    gc.collect()  # hooks tie a model into cycles
    say(f"reference {reference}")
    before = look(opens[1](), texts, say)
    report = audit(title, config, seen)
    report["drift"] = drift(seen, before, reference)
    return finite(report)


def drift(seen: Look, reference: Look, name: str) -> dict[str, Any]:
    """How alike two models route the same text, per layer and by domain. Raises E305.

    overlap: the share of assignments that are equal; divergence: of the loads (Jensen-Shannon,
    base 2); confidence and loss: the reference's, then the model's.
    """
    here, there = seen.total.load, reference.total.load
    if here.shape != there.shape or _tokens(seen) != _tokens(reference):
        why = f"has {_size(there)}, the model {_size(here)}"
        fix = "name the model that it was made from"
        raise ExpertlyError("E305", f"reference {name}", why, fix=fix)
    chosen = [torch.cat([*each.chosen.values()], dim=1) for each in (seen, reference)]
    return {
        "reference": name,
        "overlap": _rounded(_alike(*chosen)),
        "divergence": _rounded(divergence(here, there)),
        "domains": {domain: _of_domain(domain, seen, reference) for domain in seen.counts},
    }


def _of_domain(domain: str, seen: Look, reference: Look) -> dict[str, Any]:
    counts, before = seen.counts[domain], reference.counts[domain]
    alike = _alike(seen.chosen[domain], reference.chosen[domain])
    return {
        "overlap": _rounded(alike),
        "divergence": _rounded(divergence(counts.load, before.load)),
        "confidence": [_confidence(before), _confidence(counts)],
        "loss": [round(each.losses[domain], 4) for each in (reference, seen)],
    }


def _alike(chosen: Tensor, other: Tensor) -> Tensor:
    return overlap(chosen, other, torch.ones(chosen.shape[1], dtype=torch.bool))


def _confidence(counts: LayerCounts) -> float:
    """The mean highest probability, over all layers."""
    return round(float(layer_stats(counts)["router_confidence"].mean()), 4)


def _tokens(seen: Look) -> list[int]:
    return [chosen.shape[1] for chosen in seen.chosen.values()]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _size(load: Tensor) -> str:
    layers, experts = load.shape
    return f"{layers} MoE layers of {experts} experts"
