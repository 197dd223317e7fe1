"""What is written down of a router's counts: one record, in a run's router.jsonl or in an audit."""

from typing import Any

from torch import Tensor

from expertly.watch.stats import LayerCounts, layer_stats

_PER_LAYER = ("router_confidence", "dropped_frac", "aux_loss_per_k")  # the load says the rest


def snapshot(counts: LayerCounts, norms: Tensor | None) -> dict[str, Any]:
    """Load and gate mass as shares of 1, and each layer's other numbers.

    norms: (layers, experts) of the experts' outputs, NaN where unknown; None when not measured.
    """
    layers = layer_stats(counts)
    said: dict[str, Any] = {
        "load": shares(counts.load),
        "mass": shares(counts.mass),
        "layers": {name: _rounded(layers[name].tolist()) for name in _PER_LAYER},
    }
    if norms is not None:
        said["norms"] = [_rounded(row) for row in norms.tolist()]
    return said


def shares(load: Tensor) -> list[list[float]]:
    """A load (layers, experts) as shares of 1."""
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return [_rounded(row) for row in share.tolist()]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]
