"""Low-rank terms beside a stack of experts' weights: each expert's rows through its own A, then B.

The full-size product B A is never made, so adapters cost what they hold: for experts that are
packed as for others.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from expertly.kernels.grouped import grouped_linear

_EVEN = 8  # a grouped product on a GPU takes rows of 16 bytes


class LowRank(NamedTuple):
    """What is added to a stack of weights (experts, out, in): scaling * b @ a, per expert."""

    a: Tensor  # (experts, rank, in)
    b: Tensor  # (experts, out, rank)
    scaling: float


def low_rank_of(experts: Any, name: str) -> LowRank | None:
    """The term beside one of an experts module's stacks; None where there is none.

    Terms are in its attribute low_rank: by the stack's name, what gives its factors.
    """
    terms = getattr(experts, "low_rank", None) or {}
    return terms[name].factors() if name in terms else None


def low_rank_linear(x: Tensor, term: LowRank, counts: Tensor) -> Tensor:
    """Each expert's rows of x (assignments, in) through its own term: (assignments, out).

    counts: (experts,) rows of each expert, in order. LoRA (Hu et al. 2021, arXiv 2106.09685),
    section 4.1.
    """
    a, b = term.a.to(x.dtype), term.b.to(x.dtype)
    if x.device.type != "cpu" and a.shape[1] % _EVEN:
        padding = -a.shape[1] % _EVEN
        a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))
    return grouped_linear(grouped_linear(x, a, counts), b, counts) * term.scaling
