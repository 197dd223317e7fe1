"""What fewer bits are expected to cost, in points of a zero-shot mean."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from expertly.plan.precision import Precision, precision
from expertly.plan.shape import Shape, parameters, total

# EAC-MoE (ACL 2025, arXiv 2508.01625), Table 2: mean of 8 zero-shot tasks, as the models are, and
# by bits of their experts, attention has 4. The routers are calibrated to the quantised model
# (QESC). By family and parameters: Mixtral 8x7B, Phi-3.5-MoE, DeepSeek-MoE 16B, Qwen1.5-MoE-A2.7B.
_SCORES = {
    ("mixtral", 46_702_792_704): (72.64, {3.0: 72.21, 2.5: 69.61, 2.0: 66.31}),
    ("phimoe", 41_873_153_344): (69.62, {3.0: 68.49, 2.5: 66.53, 2.0: 65.03}),
    ("deepseek", 16_375_728_128): (61.38, {3.0: 61.22, 2.5: 58.33, 2.0: 57.05}),
    ("qwen2_moe", 14_315_784_192): (64.72, {3.0: 62.89, 2.5: 61.47, 2.0: 59.52}),
}
MEASURED: Mapping[tuple[str, int], Mapping[float, float]] = {
    model: {bits: full - score for bits, score in scores.items()}
    for model, (full, scores) in _SCORES.items()
}
MEAN = {bits: fmean(row[bits] for row in MEASURED.values()) for bits in (3.0, 2.5, 2.0)}
ASSUMED = {16.0: 0.0, 8.0: 0.1, 4.0: 0.5}  # bounds, of weights and of the KV cache

_Curve = Sequence[tuple[float, float]]


class Quality(NamedTuple):
    """Points that are lost, and how that is known: "measured", "assumed" or "nothing lost"."""

    points: float
    known: str


def quality(shape: Shape, stored: Precision, kv_bits: float = 16) -> Quality:
    """What these formats are expected to lose against those of the model's own checkpoint.

    Measured where EAC-MoE measured it: four models, their experts of 3, 2.5 or 2 bits, attention
    of 4 and a KV cache of 16. Else assumed, by straight lines between the model's own figures, or
    the mean of these four, and the bounds for 8 and 4 bits.
    """
    there = parameters(shape)
    blocks = [part for part in ("experts", "shared experts", "dense layers") if part in there]
    lowest = min((_bits(shape, stored, part) for part in blocks), default=16.0)
    attention = _bits(shape, stored, "attention")
    row = MEASURED.get((shape.family, total(shape).total), {})
    if lowest in row and attention >= 4 and kv_bits >= 16:
        return Quality(row[lowest], "measured")
    curve = _curve(row or MEAN)
    points = max(_points(lowest, curve), _points(attention, curve)) + _points(kv_bits, _MEAN_CURVE)
    return Quality(points, "assumed" if points else "nothing lost")


def _bits(shape: Shape, stored: Precision, part: str) -> float:
    """Of a part; 16 where it has at least as many as the model was made with."""
    own, held = precision(shape)[part], stored[part]
    return 16.0 if held.name == own.name or held.bits > own.bits else held.bits


def _curve(measured: Mapping[float, float]) -> _Curve:
    """Points that are lost by bits. Who loses less than the mean at 3 bits does so at 4, too."""
    most = ASSUMED[4.0] * measured[3.0] / MEAN[3.0]
    bounds = {bits: min(points, most) for bits, points in ASSUMED.items()}
    return sorted({**bounds, **measured}.items())


_MEAN_CURVE = _curve(MEAN)


def _points(bits: float, curve: _Curve) -> float:
    """On the curve; below its end as steep as there."""
    if bits >= curve[-1][0]:
        return 0.0
    place = next((place for place, (upper, _) in enumerate(curve) if bits < upper), 1)
    (low, most), (high, least) = curve[max(place, 1) - 1 : max(place, 1) + 1]
    return most + (bits - low) * (least - most) / (high - low)
