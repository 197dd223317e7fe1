"""Packed weights: one low-bit matrix, or one stack of experts, in the order the kernels stream.

Rows stand in blocks of 16, the width of a vector register. A block is a list of 32-bit words,
16 rows side by side: a word holds 8 inputs of its row at 4 bits, 4 at 8 bits, 2 at 16 bits. This
file knows the layout and its sizes; quantize.py chooses the levels and scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertly.errors import ExpertlyError

BLOCK = 16  # rows
GROUP_SIZES = (32, 64, 128)
_WORD = {4: 8, 8: 4, 16: 2}  # bits -> inputs in 32 bits
_STORED = {4: torch.uint8, 8: torch.uint8, 16: torch.bfloat16}
_NIBBLES = 0x0F0F0F0F
_CHUNK = 1 << 18  # weights worked on at a time: their float32 copies stay in a core's cache


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed matrix (out, in) or a stack of them (experts, out, in).

    data: (experts, blocks, words, 16, a word's bytes or bfloat16s); experts is 1 for a matrix.
    At 4 bits byte j of word c holds input 8c + j in its low and 8c + 4 + j in its high nibble.
    scales: (experts, blocks, in / group_size, 16) float16, None at 16 bits; zeros: None
    (symmetric), uint8 (zero points) or float16 (minima), of the same shape. A weight is
    scale * (q - 2^(bits - 1)), scale * (q - zero) or scale * q + minimum. Rows up to the next
    multiple of 16 weigh zero. shape: without the padding. Raises E202, or E301 for wrong sizes.
    """

    data: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        parts = packed_parts(self.shape, self.bits, self.group_size)
        _check("data", self.data, parts.data, (_STORED[self.bits],))
        if self.bits == 16:
            parts = parts._replace(groups=None)
        _check("scales", self.scales, parts.groups, (torch.float16,))
        if self.zeros is not None:
            _check("zeros", self.zeros, parts.groups, (torch.uint8, torch.float16))

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy is made from the fields alone: the kernels keep addresses beside them
        fields = (self.data, self.scales, self.zeros, self.bits, self.group_size, self.shape)
        return PackedWeight, fields

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, padding included."""
        return sum(part.nbytes for part in (self.data, self.scales, self.zeros) if part is not None)

    @property
    def experts(self) -> int:
        """Matrices in the stack."""
        return self.data.shape[0]


class Parts(NamedTuple):
    """Shapes of a packed weight's tensors."""

    data: tuple[int, ...]
    groups: tuple[int, ...] | None  # of scales and zeros


class Levels(NamedTuple):
    """A packed weight taken apart: (.., out, in) levels; (.., out, in / group_size) the others."""

    q: Tensor  # uint8; at 16 bits the bfloat16 weights themselves
    scales: Tensor | None
    zeros: Tensor | None


def packed_parts(shape: tuple[int, ...], bits: int, group_size: int) -> Parts:
    """The tensors' shapes for a weight of this logical shape. Raises E202."""
    _check_settings(shape, bits, group_size)
    experts, (out, width) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    blocks, words = -(-out // BLOCK), -(-width // _WORD[bits])
    data = (experts, blocks, words, BLOCK, 4 // _STORED[bits].itemsize)
    groups = (experts, blocks, width // group_size, BLOCK) if bits < 16 else None
    return Parts(data, groups)


def empty_packed(
    shape: tuple[int, ...], bits: int, group_size: int, zeros: torch.dtype | None = None
) -> PackedWeight:
    """A packed weight of zeros to write rows into.

    zeros: None, uint8 or float16, the kind of its zero points. Raises E202.
    """
    parts = packed_parts(shape, bits, group_size)
    data = torch.zeros(parts.data, dtype=_STORED[bits])
    if parts.groups is None:
        return PackedWeight(data, None, None, bits, group_size, shape)
    scales = torch.zeros(parts.groups, dtype=torch.float16)
    points = None if zeros is None else torch.zeros(parts.groups, dtype=zeros)
    return PackedWeight(data, scales, points, bits, group_size, shape)


def pack(
    q: Tensor, scales: Tensor | None, zeros: Tensor | None, bits: int, group_size: int
) -> PackedWeight:
    """Lay levels (.., out, in) out for the kernels; unpack's inverse.

    q: uint8, or bfloat16 weights at 16 bits; scales, zeros: (.., out, in / group_size). Raises
    E202, or E301 for wrong sizes.
    """
    shape = tuple(q.shape)
    parts = packed_parts(shape, bits, group_size)
    _check("levels", q, shape, (_STORED[bits],), contiguous=False)
    groups = None if parts.groups is None else (*shape[:-1], parts.groups[2])
    _check("scales", scales, groups, (torch.float16,), contiguous=False)
    if zeros is not None:
        _check("zeros", zeros, groups, (torch.uint8, torch.float16), contiguous=False)
    if bits == 4 and q.numel() and int(q.max()) > 15:
        raise _wrong("levels", f"{int(q.max())} does not fit into 4 bits")
    packed = empty_packed(shape, bits, group_size, None if zeros is None else zeros.dtype)
    stacks = [_stack(part) for part in (q, scales, zeros)]
    for expert in range(packed.experts):
        for rows in row_chunks(*q.shape[-2:]):
            chunk = (None if part is None else part[expert, rows] for part in stacks)
            write_rows(packed, Levels(*chunk), expert, rows.start)  # type: ignore[arg-type]
    return packed


def write_rows(packed: PackedWeight, levels: Levels, expert: int, start: int) -> None:
    """Put levels (rows, in) in place, from row start, a multiple of 16; pads the last block.

    Raises E301 for scales or minima that are not finite.
    """
    rows, width = levels.q.shape
    blocks = slice(start // BLOCK, start // BLOCK + -(-rows // BLOCK))
    even = F.pad(levels.q, (0, -width % _WORD[packed.bits], 0, -rows % BLOCK)).contiguous()
    words = _to_words(even, packed.bits)
    words = words.view(-1, BLOCK, words.shape[-1]).mT
    packed.data[expert, blocks].view(torch.int32).squeeze(-1).copy_(words)
    for to, part in ((packed.scales, levels.scales), (packed.zeros, levels.zeros)):
        if to is not None and part is not None:
            _check_finite(part)
            part = F.pad(part, (0, 0, 0, -rows % BLOCK))
            to[expert, blocks] = part.view(-1, BLOCK, part.shape[-1]).mT


def read_rows(packed: PackedWeight, expert: int, rows: slice) -> Levels:
    """The levels (rows, in) of some rows; rows.start is a multiple of 16."""
    blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
    count, width = rows.stop - rows.start, packed.shape[-1]
    words = packed.data[expert, blocks].view(torch.int32).squeeze(-1).mT.flatten(0, 1)
    q = _from_words(words, packed.bits)[:count, :width]
    scales, zeros = (
        None if part is None else part[expert, blocks].mT.flatten(0, 1)[:count]
        for part in (packed.scales, packed.zeros)
    )
    return Levels(q, scales, zeros)


def unpack(packed: PackedWeight) -> Levels:
    """Levels, scales and zeros in the logical order; pack's inverse."""
    width = packed.shape[-1]
    experts = [
        [read_rows(packed, expert, rows) for rows in row_chunks(packed.shape[-2], width)]
        for expert in range(packed.experts)
    ]
    joined = (_join([[chunk[part] for chunk in chunks] for chunks in experts]) for part in range(3))
    q, scales, zeros = (
        None if part is None else part.view(*packed.shape[:-1], -1) for part in joined
    )
    assert q is not None
    return Levels(q, scales, zeros)


def dequantize(
    packed: PackedWeight, dtype: torch.dtype = torch.float32, expert: int | None = None
) -> Tensor:
    """The weights as numbers: of the logical shape, or (out, in) of one expert."""
    chosen = range(packed.experts) if expert is None else [expert]
    out = packed.data.new_empty(len(chosen), *packed.shape[-2:], dtype=dtype)
    for matrix, index in zip(out, chosen, strict=True):
        for rows in row_chunks(*packed.shape[-2:]):
            matrix[rows] = dequantize_rows(packed, index, rows)
    return out.view(packed.shape) if expert is None else out[0]


def dequantize_rows(packed: PackedWeight, expert: int, rows: slice) -> Tensor:
    """Some rows as numbers: (rows, in) float32; rows.start is a multiple of 16."""
    levels = read_rows(packed, expert, rows)
    if levels.scales is None:
        return levels.q.float()
    groups = levels.q.view(*levels.scales.shape, packed.group_size)
    return levels_to_float(levels._replace(q=groups), packed.bits).flatten(-2)


def levels_to_float(levels: Levels, bits: int) -> Tensor:
    """The numbers that levels in groups (rows, groups, group_size) stand for, in float32."""
    q, scales, zeros = levels.q.float(), levels.scales, levels.zeros
    assert scales is not None
    if zeros is None:
        q.sub_(1 << (bits - 1))
    elif zeros.dtype == torch.uint8:
        q.sub_(zeros.unsqueeze(-1))
    q.mul_(scales.float().unsqueeze(-1))
    if zeros is not None and zeros.dtype == torch.float16:
        q.add_(zeros.float().unsqueeze(-1))  # apart from the product, as GGUF's own readers round
    return q


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Runs of whole blocks that are small enough to work on at once."""
    step = max(1, _CHUNK // (BLOCK * width)) * BLOCK
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _to_words(q: Tensor, bits: int) -> Tensor:
    """(rows, in) levels to (rows, words) of 32 bits."""
    words = q.view(torch.int32)
    if bits != 4:
        return words
    low, high = words[:, ::2], words[:, 1::2]
    return low | (high << 4)


def _from_words(words: Tensor, bits: int) -> Tensor:
    if bits == 4:
        words = torch.stack([words & _NIBBLES, (words >> 4) & _NIBBLES], dim=-1).flatten(-2)
    return words.flatten().view(_STORED[bits]).view(len(words), -1)


def _stack(part: Tensor | None) -> Tensor | None:
    return part if part is None or part.dim() == 3 else part.unsqueeze(0)


def _join(experts: list[list[Tensor | None]]) -> Tensor | None:
    """Chunks of rows, expert by expert, as one (experts x out, ..) tensor."""
    chunks = [chunk for chunks in experts for chunk in chunks if chunk is not None]
    return torch.cat(chunks) if chunks else None


def _check_settings(shape: tuple[int, ...], bits: int, group_size: int) -> None:
    if bits not in _WORD:
        raise _refused("bits", f"a packed weight has 4, 8 or 16 bits, not {bits}", "choose one")
    if len(shape) not in (2, 3) or min(shape) < 1:
        why = f"packed weights are (out, in) or (experts, out, in), not {tuple(shape)}"
        raise _refused("a weight's shape", why, "leave this tensor as it is")
    if bits == 16:
        if group_size:
            raise _refused("group_size", "16 bits have no groups", "give 0")
        return
    if group_size not in GROUP_SIZES:
        why = f"groups have 32, 64 or 128 weights, not {group_size}"
        raise _refused("group_size", why, "choose one")
    if shape[-1] % group_size:
        why = f"an input width of {shape[-1]} does not divide into groups of {group_size}"
        raise _refused("group_size", why, "choose a smaller one that divides it, or 16 bits")


def _refused(what: str, why: str, fix: str) -> ExpertlyError:
    return ExpertlyError("E202", what, why, fix=fix)


def _wrong(what: str, why: str) -> ExpertlyError:
    fix = "pack the weight again from the original"
    return ExpertlyError("E301", f"a packed weight's {what}", why, fix=fix)


def _check_finite(part: Tensor) -> None:
    if part.is_floating_point() and not bool(part.isfinite().all()):
        count = part.numel() - int(part.isfinite().sum())
        raise _wrong("scales or minima", f"{count} are not finite numbers")


def _check(
    name: str,
    part: Tensor | None,
    shape: tuple[int, ...] | None,
    dtypes: tuple[torch.dtype, ...],
    contiguous: bool = True,
) -> None:
    """Refuse a part that is not what the kernels will read; shape None: there must be none."""
    if part is None or shape is None:
        if part is not None or shape is not None:
            raise _wrong(name, "missing" if part is None else "these bits have none")
        return
    if tuple(part.shape) != shape or part.dtype not in dtypes:
        found, wanted = (tuple(part.shape), part.dtype), (shape, dtypes[0])
        raise _wrong(name, f"found {found[0]} {found[1]}, expected {wanted[0]} {wanted[1]}")
    if part.device.type != "cpu" or (contiguous and not part.is_contiguous()):
        raise _wrong(name, "not one contiguous piece of the CPU's memory")
