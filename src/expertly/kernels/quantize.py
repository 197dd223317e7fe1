"""Quantisation by rounding to nearest: which levels and scales stand for a weight.

Works on a few hundred thousand weights at a time and writes them packed at once, so a stack of
experts never exists in float32. Choosing better scales from data is calibration, not done here.
"""

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.kernels.packed import (
    Levels,
    PackedWeight,
    empty_packed,
    levels_to_float,
    row_chunks,
    write_rows,
)

# the tried fractions of a group's range: outliers are cut for the sake of the many
_SEARCH = tuple(1 - 0.03 * step for step in range(1, 12))


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int = 32,
    *,
    symmetric: bool = True,
    minimum: bool = False,
    search: bool = False,
    name: str = "a weight",
) -> PackedWeight:
    """Pack a matrix (out, in) or a stack (experts, out, in), rounding to nearest.

    symmetric=False gives each group an integer zero point, or, with minimum, a float16 minimum;
    search takes the scales of least squared error from a grid. At 16 bits, bfloat16 without
    groups. Raises E202, also for float8 and integers, or E301 with the name for values that are not
    finite.
    """
    points = None if symmetric or bits == 16 else torch.float16 if minimum else torch.uint8
    groups = 0 if bits == 16 else group_size
    packed = empty_packed(tuple(weight.shape), bits, groups, points)
    stack = weight.unsqueeze(0) if weight.dim() == 2 else weight
    for expert, matrix in enumerate(stack):
        quantize_rows(packed, matrix, expert, search=search, name=name)
    return packed


def quantize_rows(
    packed: PackedWeight,
    weight: Tensor,
    expert: int = 0,
    start: int = 0,
    *,
    search: bool = False,
    name: str = "a weight",
) -> None:
    """Write the rows of weight (rows, in), of any strides, in place from row start.

    start: a multiple of 16. Raises E301 and E202 as quantize does.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise _quantised(weight, name)
    for rows in row_chunks(*weight.shape):
        chunk = weight[rows].detach()
        low, high = chunk.aminmax()
        if not bool((low.float().abs() < torch.inf) & (high.float().abs() < torch.inf)):
            raise _too_large(name) if bool(weight.isfinite().all()) else _not_finite(weight, name)
        levels = _rounded(chunk, packed, search)
        if not _finite(levels):
            raise _too_large(name)
        write_rows(packed, levels, expert, start + rows.start)


def _rounded(weight: Tensor, packed: PackedWeight, search: bool) -> Levels:
    """The levels of some rows in the packed weight's format."""
    if packed.bits == 16:
        return Levels(weight.to(torch.bfloat16), None, None)
    kind = None if packed.zeros is None else packed.zeros.dtype
    groups = weight.float().unflatten(-1, (-1, packed.group_size))
    low, high = torch.aminmax(groups, dim=-1)
    best = _levels(groups, low, high, packed.bits, kind)
    for part in _SEARCH if search else ():
        tried = _levels(groups, low * part, high * part, packed.bits, kind)
        best = _better(groups, best, tried, packed)
    return best._replace(q=best.q.flatten(-2))


def _levels(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, kind: torch.dtype | None
) -> Levels:
    """Round groups (rows, groups, group_size) to what their range (rows, groups) asks for."""
    top = (1 << bits) - 1
    if kind is None:
        scales = _half(_symmetric_scale(low, high, bits))
    else:
        if kind == torch.uint8:  # a zero point must lie among the levels
            low, high = low.clamp(max=0), high.clamp(min=0)
        scales = _half((high - low) / top)
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    if kind is None:
        zeros, offset = None, torch.full_like(inverse, 1 << (bits - 1))
    elif kind == torch.uint8:
        offset = (-low * inverse).round_().clamp_(0, top)
        zeros = offset.to(torch.uint8)
    else:
        zeros = low.half()
        offset = -zeros.float() * inverse
    scaled = torch.addcmul(offset.unsqueeze(-1), groups, inverse.unsqueeze(-1))
    return Levels(scaled.round_().clamp_(0, top).to(torch.uint8), scales, zeros)


def _half(scales: Tensor) -> Tensor:
    """To float16; below its normal numbers away from 0, so that no end of a range is cut off."""
    size = scales.abs()
    away = torch.copysign((size * 2**24).ceil() * 2**-24, scales)
    return torch.where(size < 2**-14, away, scales).half()


def _symmetric_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """At 4 bits the extreme of either sign becomes level 0, the one step that only one side has."""
    if bits == 4:
        return torch.where(high > -low, high, low) / -8
    return torch.maximum(high, -low) / ((1 << (bits - 1)) - 1)


def _better(groups: Tensor, best: Levels, tried: Levels, packed: PackedWeight) -> Levels:
    """The tried levels in the groups whose squared error they make smaller."""
    new, old = (_squared_error(groups, levels, packed) for levels in (tried, best))
    wins = new < old
    q = torch.where(wins.unsqueeze(-1), tried.q, best.q)
    scales, zeros = (
        None if one is None or other is None else torch.where(wins, one, other)
        for one, other in ((tried.scales, best.scales), (tried.zeros, best.zeros))
    )
    return Levels(q, scales, zeros)


def _squared_error(groups: Tensor, levels: Levels, packed: PackedWeight) -> Tensor:
    return (levels_to_float(levels, packed.bits) - groups).square_().sum(dim=-1)


def _finite(levels: Levels) -> bool:
    floats = (part for part in levels if part is not None and part.is_floating_point())
    return all(bool(part.isfinite().all()) for part in floats)


def _not_finite(weight: Tensor, name: str) -> ExpertlyError:
    bad = weight.numel() - int(weight.isfinite().sum())
    why = f"{bad} of {weight.numel()} values are not finite numbers"
    return ExpertlyError("E301", name, why, fix="fetch or convert the model again")


def _quantised(weight: Tensor, name: str) -> ExpertlyError:
    why = f"{str(weight.dtype).removeprefix('torch.')} numbers mean nothing without their scales"
    return ExpertlyError("E202", name, why, fix="convert the model to bfloat16 first")


def _too_large(name: str) -> ExpertlyError:
    why = "its values are too large for float16 scales or bfloat16"
    return ExpertlyError("E301", name, why, fix="leave this tensor as it is")
