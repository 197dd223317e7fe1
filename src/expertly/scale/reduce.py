"""Sums over ranks: what every process counted, added up on all of them. It moves no weights."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over all ranks, in one collective; without ranks, the tensors as they are.

    Every rank calls it with the same shapes and dtypes. Summed in float64, so counts stay exact.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(tensors)
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.view(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
