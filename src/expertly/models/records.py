"""Packed matrices as rows of bytes, so that a family's own conversion can move them about.

transformers stacks, joins, splits and renames a family's weights between its files and its
modules. Those moves are of whole rows, so a packed matrix goes through them as a uint8 matrix
whose rows hold all that belongs to a row: a mark, scales, zero points, levels. The mark shows a
conversion that did anything else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.kernels.packed import (
    Levels,
    PackedWeight,
    empty_packed,
    read_rows,
    row_chunks,
    write_rows,
)

_MARK = (0xE5, 0x9A)
_START = 8  # bytes of a row before its scales


class Record(NamedTuple):
    """Rows taken apart, as files hold them: levels lie side by side in bytes, low bits first."""

    levels: Tensor  # (.., rows, in x bits / 8) uint8
    scales: Tensor  # (.., rows, groups) float16
    zeros: Tensor | None  # (.., rows, groups) uint8
    bits: int
    group_size: int


def join_record(record: Record) -> Tensor:
    """(.., rows, bytes) uint8."""
    points = record.zeros is not None
    start = torch.tensor([*_MARK, record.bits, record.group_size, points, 0, 0, 0])
    start = start.to(torch.uint8).expand(*record.levels.shape[:-1], _START)
    parts = [start, seen_as(record.scales, torch.uint8)]
    parts += [record.zeros] if record.zeros is not None else []
    return torch.cat([*parts, record.levels], dim=-1)


def split_record(rows: Tensor, name: str) -> Record:
    """join_record's inverse. Raises E306 when these are no longer whole rows."""
    start = rows[..., :_START].reshape(-1, _START)
    if rows.dtype != torch.uint8 or start.shape[1] < _START or not bool((start == start[0]).all()):
        raise _not_rows(name)
    *mark, bits, group_size, points = start[0, :5].tolist()
    if tuple(mark) != _MARK:
        raise _not_rows(name)
    per_group = 2 + points + group_size * bits // 8
    groups, rest = divmod(rows.shape[-1] - _START, per_group)
    if groups < 1 or rest:
        raise _not_rows(name)
    scales, zeros, levels = rows[..., _START:].split(
        [2 * groups, points * groups, groups * group_size * bits // 8], dim=-1
    )
    scales = seen_as(scales, torch.float16)
    return Record(levels, scales, zeros if points else None, bits, group_size)


def pack_record(rows: Tensor, name: str) -> PackedWeight:
    """(.., out, bytes) in the kernels' layout, level for level. Raises E306 as split_record."""
    record = split_record(rows, name)
    shape = (*rows.shape[:-1], record.levels.shape[-1] * 8 // record.bits)
    kind = None if record.zeros is None else torch.uint8
    packed = empty_packed(shape, record.bits, record.group_size, kind)
    stacked = [part if part is None or part.dim() == 3 else part[None] for part in record[:3]]
    for expert in range(packed.experts):
        for chunk in row_chunks(*shape[-2:]):
            levels, scales, zeros = (None if p is None else p[expert, chunk] for p in stacked)
            assert levels is not None
            q = _apart(levels) if record.bits == 4 else levels
            write_rows(packed, Levels(q, scales, zeros), expert, chunk.start)
    return packed


def record_of(packed: PackedWeight) -> Tensor:
    """pack_record's inverse: (.., out, bytes)."""
    made = [
        torch.cat([_rows(packed, expert, rows) for rows in row_chunks(*packed.shape[-2:])])
        for expert in range(packed.experts)
    ]
    return torch.stack(made).view(*packed.shape[:-1], -1)


def seen_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as numbers of another dtype."""
    # contiguous() keeps strides of dimensions of 1 as they are, which view() refuses
    return tensor.clone(memory_format=torch.contiguous_format).view(dtype)


def _rows(packed: PackedWeight, expert: int, rows: slice) -> Tensor:
    q, scales, zeros = read_rows(packed, expert, rows)
    assert scales is not None
    levels = q[:, ::2] | q[:, 1::2] << 4 if packed.bits == 4 else q
    return join_record(Record(levels, scales, zeros, packed.bits, packed.group_size))


def _apart(levels: Tensor) -> Tensor:
    """Two levels a byte to one a byte."""
    return torch.stack([levels & 15, levels >> 4], dim=-1).flatten(-2)


def _not_rows(name: str) -> ExpertlyError:
    why = "its family's files and modules do not hold it in the same rows, as packed files must"
    return ExpertlyError("E306", name, why, fix="open and save this family with bits=16")
