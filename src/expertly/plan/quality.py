"""What fewer bits are expected to cost, in points of a zero-shot mean."""

from typing import NamedTuple

from expertly.plan.precision import FORMATS, Precision
from expertly.plan.shape import Shape, parameters

# EAC-MoE (ACL 2025, arXiv 2508.01625), Table 2: mean of 8 zero-shot tasks of Mixtral 8x7B,
# Phi-3.5-MoE, DeepSeek-MoE 16B and Qwen1.5-MoE-A2.7B; by bits of the experts, attention has 4.
# The routers are calibrated to the quantised model (QESC).
_FULL = (72.64, 69.62, 61.38, 64.72)
_CALIBRATED = {
    3.0: (72.21, 68.49, 61.22, 62.89),
    2.5: (69.61, 66.53, 58.33, 61.47),
    2.0: (66.31, 65.03, 57.05, 59.52),
}
MEASURED = {bits: sum(_FULL) / 4 - sum(row) / 4 for bits, row in _CALIBRATED.items()}
ASSUMED = {16.0: 0.0, 8.0: 0.1, 4.0: 0.5}  # bounds, of weights and of the KV cache
_CURVE = sorted((ASSUMED | MEASURED).items())


class Quality(NamedTuple):
    """Points that are lost, and how that is known: "measured", "assumed" or "nothing lost"."""

    points: float
    known: str


def quality(shape: Shape, stored: Precision, kv_bits: float = 16) -> Quality:
    """What these formats are expected to lose against those of the model's own checkpoint.

    Measured where EAC-MoE measured it: experts of 3, 2.5 or 2 bits with attention of 4, and a KV
    cache of 16. Else assumed, by straight lines between those and the bounds for 8 and 4 bits.
    """
    there = parameters(shape)
    blocks = [part for part in ("experts", "shared experts", "dense layers") if part in there]
    lowest = min((_bits(shape, stored, part) for part in blocks), default=16.0)
    attention = _bits(shape, stored, "attention")
    points = max(_points(lowest), _points(attention)) + _points(kv_bits)
    if not points:
        return Quality(0.0, "nothing lost")
    measured = "experts" in there and lowest in MEASURED and attention >= 4 and kv_bits >= 16
    return Quality(points, "measured" if measured else "assumed")


def _bits(shape: Shape, stored: Precision, part: str) -> float:
    """Of a part; 16 where it has at least as many as the model was made with."""
    own = FORMATS[(shape.stored or {}).get(part, "bf16")]
    held = stored[part]
    return 16.0 if held.name == own.name or held.bits > own.bits else held.bits


def _points(bits: float) -> float:
    """On the curve; below its end as steep as there."""
    if bits >= _CURVE[-1][0]:
        return 0.0
    place = next((place for place, (upper, _) in enumerate(_CURVE) if bits < upper), 1)
    (low, most), (high, least) = _CURVE[max(place, 1) - 1 : max(place, 1) + 1]
    return most + (bits - low) * (least - most) / (high - low)
