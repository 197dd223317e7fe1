"""Router statistics: pure functions from counts to the watch set. One definition, everywhere.

Assignment load (how many tokens an expert got) and gate mass (how much weight it was given) differ,
so both are reported. A perfectly even load has entropy_norm 1, max_load_ratio 1 and load_cv 0.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.moe.losses import imbalance


class LayerCounts(NamedTuple):
    """What one step's decisions add up to; every tensor is float64, the first axis is the layer."""

    load: Tensor  # (layers, experts), assignments served
    chosen: Tensor  # (layers, experts), assignments before capacity
    mass: Tensor  # (layers, experts), weight given, dropped assignments excluded
    confidence: Tensor  # (layers,), sum over tokens of the highest probability
    log_z: Tensor  # (layers,), sum over tokens of logsumexp^2
    probs: Tensor  # (layers, experts), sum over tokens of the router's probabilities
    tokens: Tensor  # (layers,), valid ones: an encoder's and its decoder's differ


def watch_set(counts: LayerCounts, bias: Tensor | None = None) -> dict[str, Any]:
    """The run's scalars for one step, each the mean over layers, and the worst layer by load.

    bias: (layers, experts) or None. Names as in docs/router.md.
    """
    layers = layer_stats(counts)
    scalars = {name: float(values.mean()) for name, values in layers.items()}
    worst = int(layers["max_load_ratio"].argmax())
    load = counts.load[worst]
    return {
        **scalars,
        "max_load_ratio": float(layers["max_load_ratio"].max()),
        "min_load_ratio": float(layers["min_load_ratio"].min()),
        "bias_range": 0.0 if bias is None else float((bias.amax(-1) - bias.amin(-1)).max()),
        "worst_layer": worst,
        "hottest_expert": int(load.argmax()),
        "coldest_expert": int(load.argmin()),
    }


def layer_stats(counts: LayerCounts) -> dict[str, Tensor]:
    """The watch set per layer: (layers,) each."""
    load, tokens = counts.load, counts.tokens.clamp(min=1)
    even = load.mean(dim=-1).clamp(min=1e-12)
    chosen = counts.chosen.sum(dim=-1)
    return {
        "load_cv": load.std(dim=-1, correction=0) / even,
        "max_load_ratio": load.amax(dim=-1) / even,
        "min_load_ratio": load.amin(dim=-1) / even,
        "dead_frac": (load == 0).double().mean(dim=-1),
        "entropy_norm": evenness(load),
        "effective_experts": entropy(load).exp(),
        "mass_entropy_norm": evenness(counts.mass),
        "router_confidence": counts.confidence / tokens,
        "dropped_frac": (chosen - load.sum(dim=-1)) / chosen.clamp(min=1),
        **_losses(counts, tokens),
    }


def specialisation(load: Tensor) -> Tensor:
    """How differently domains use the experts: (layers,), 0 alike to 1 disjoint.

    The Jensen-Shannon divergence of their loads, equal weights, over log(domains). load:
    (domains, layers, experts); a domain without a token is left out.
    """
    load = load[load.flatten(1).sum(dim=-1) > 0].double()
    if len(load) < 2:
        return load.new_zeros(load.shape[1])
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    within = entropy(share).mean(dim=0)
    return ((entropy(share.mean(dim=0)) - within) / math.log(len(load))).clamp(0, 1)


def divergence(load_a: Tensor, load_b: Tensor) -> Tensor:
    """Jensen-Shannon divergence, base 2, of two loads (layers, experts): (layers,), 0 to 1."""
    return specialisation(torch.stack([load_a, load_b]))


def overlap(chosen_a: Tensor, chosen_b: Tensor, valid: Tensor) -> Tensor:
    """The share of assignments that two models make alike on the same tokens: (layers,).

    chosen_a, chosen_b: expert ids (layers, tokens, top_k), in any order within a token; valid:
    (tokens,). With different top_k it is of the larger one.
    """
    both = chosen_a.unsqueeze(-1) == chosen_b.unsqueeze(-2)  # (layers, tokens, k, k)
    alike = (both.flatten(2).sum(dim=-1) * valid).sum(dim=-1).double()
    of_token = max(chosen_a.shape[-1], chosen_b.shape[-1])
    return alike / (valid.sum() * of_token).clamp(min=1)


def evenness(load: Tensor) -> Tensor:
    """A load's entropy over that of an even one: (layers,). A single expert is always even."""
    most = math.log(load.shape[-1])
    return entropy(load) / most if most else torch.ones_like(load[:, 0])


def entropy(load: Tensor) -> Tensor:
    """Shannon entropy, in nats, of a load (layers, experts) as shares of 1: (layers,)."""
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return -torch.special.xlogy(share, share).sum(dim=-1)


def _losses(counts: LayerCounts, tokens: Tensor) -> dict[str, Tensor]:
    """The losses as the training loop defines them, and one that compares across top_k: (layers,).

    On Hugging Face's scale an even load's aux_loss is top_k; divided by the assignments per token
    it is 1 at any top_k.
    """
    share = counts.chosen / tokens.unsqueeze(-1)
    aux_loss = imbalance(share, counts.probs / tokens.unsqueeze(-1))
    return {
        "aux_loss": aux_loss,
        "aux_loss_per_k": aux_loss / share.sum(dim=-1).clamp(min=1e-12),
        "z_loss": counts.log_z / tokens,
    }
