"""GGUF's blocks of 32 weights as packed weights, to the last bit.

Q4_0, Q4_1 and Q8_0 as ggml's ggml-common.h lays them out: a float16 scale, for Q4_1 a float16
minimum after it, then the levels. Only bytes are rearranged here; reading the file is not ours.
"""

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.kernels.packed import Levels, PackedWeight, empty_packed, row_chunks, write_rows

_GROUP = 32
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of a block


def from_gguf(blocks: Tensor, kind: str) -> PackedWeight:
    """Pack the blocks (.., out, bytes of a row) uint8 of a GGUF tensor of kind Q4_0, Q4_1, Q8_0.

    Raises E301 for another kind or a row that is not whole blocks.
    """
    _check(blocks, kind)
    shape = (*blocks.shape[:-1], blocks.shape[-1] // _BYTES[kind] * _GROUP)
    points = torch.float16 if kind == "Q4_1" else None
    packed = empty_packed(shape, 8 if kind == "Q8_0" else 4, _GROUP, points)
    stack = blocks.unsqueeze(0) if blocks.dim() == 2 else blocks
    for expert, matrix in enumerate(stack):
        for rows in row_chunks(*shape[-2:]):
            levels = _levels(matrix[rows].unflatten(-1, (-1, _BYTES[kind])), kind)
            write_rows(packed, levels, expert, rows.start)
    return packed


def _levels(blocks: Tensor, kind: str) -> Levels:
    """The levels and scales of blocks (rows, groups, bytes)."""
    scales = _halves(blocks[..., :2])
    if kind == "Q8_0":
        q = blocks[..., 2:] ^ 128  # a signed byte plus 128
        return Levels(q.flatten(-2), scales, None)
    zeros = _halves(blocks[..., 2:4]) if kind == "Q4_1" else None
    pairs = blocks[..., -16:]  # byte j holds weights j and j + 16
    q = torch.cat([pairs & 15, pairs >> 4], dim=-1)
    return Levels(q.flatten(-2), scales, zeros)


def _halves(pairs: Tensor) -> Tensor:
    """Two bytes of each block (rows, groups, 2) as a float16 (rows, groups)."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _check(blocks: Tensor, kind: str) -> None:
    if kind not in _BYTES:
        why = f"{kind} is not one of {', '.join(_BYTES)}"
        raise ExpertlyError("E301", "a GGUF tensor", why, fix="write the file in one of them")
    sizes = blocks.shape
    if blocks.dtype != torch.uint8 or len(sizes) not in (2, 3) or sizes[-1] % _BYTES[kind]:
        why = f"{tuple(sizes)} {blocks.dtype} is not rows of whole {kind} blocks"
        raise ExpertlyError("E301", "a GGUF tensor", why, fix="fetch or convert the file again")
