"""Stacks of experts at 16 bits in their family's own layout again, as its files have them.

Packed stacks are (experts, out, in), all gate rows before all up rows, and padded to 16 of each.
"""

from typing import Any

import torch
from torch import Tensor

from expertly.kernels.packed import PackedWeight, unpack


def unpack_stack(experts: Any, leaf: str, packed: PackedWeight, shape: torch.Size) -> Tensor:
    """A stack that was called leaf, in the family's layout and shape: bfloat16."""
    height, width = (shape[2], shape[1]) if experts.is_transposed else (shape[1], shape[2])
    rows = _together(experts, leaf, unpack(packed).q, height)[..., :width]
    return (rows.mT if experts.is_transposed else rows).contiguous()


def unpack_bias(experts: Any, leaf: str, bias: Tensor, shape: torch.Size) -> Tensor:
    """The bias (experts, out) of a stack in the family's order."""
    return _together(experts, leaf, bias.unsqueeze(-1), shape[1])[..., 0].contiguous()


def in_rows(experts: Any) -> bool:
    """Whether the family's layout is the packed one already."""
    return not experts.is_transposed and (experts.is_concatenated or not experts.has_gate)


def _together(experts: Any, leaf: str, rows: Tensor, height: int) -> Tensor:
    """Gate and up as the family mixes them, without the padding: (experts, height, ..)."""
    if not leaf.startswith("gate_up"):
        return rows[:, :height]
    gate, up = (half[:, : height // 2] for half in rows.chunk(2, dim=1))
    if experts.is_concatenated:
        return torch.cat([gate, up], dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)
