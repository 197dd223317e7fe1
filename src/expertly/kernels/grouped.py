"""Dispatch, grouped linear, combine: the three differentiable moves of an experts layer.

Assignments are sorted by expert once; each expert's rows then lie side by side, go through one
GEMM per expert, and are put back. On a CPU the GEMMs write straight into place and the backward
gathers by the inverse order instead of scattering, which is what makes it faster than the stock
path; on a GPU one grouped GEMM does all experts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Order(NamedTuple):
    """How assignments were sorted by expert."""

    packed: Tensor  # (assignments,), packed row -> flat (token, k) slot
    tokens: Tensor  # (assignments,), packed row -> token
    slots: Tensor  # (tokens, top_k), token's k-th choice -> packed row
    counts: Tensor  # (experts,), int64, rows of each expert


def sort_by_expert(experts: Tensor, num_experts: int) -> Order:
    """Group the assignments (tokens, top_k) by expert, in token order within each."""
    flat = experts.flatten()
    packed = flat.argsort(stable=True)
    slots = torch.empty_like(packed)
    slots[packed] = torch.arange(len(packed), device=packed.device)
    counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return Order(packed, packed // experts.shape[-1], slots.view_as(experts), counts)


def dispatch(x: Tensor, order: Order) -> Tensor:
    """Copy each token (tokens, dim) once per assignment, expert by expert: (assignments, dim)."""
    return _Dispatch.apply(x, order)


def combine(packed: Tensor, weights: Tensor, order: Order) -> Tensor:
    """Weigh each expert's answer (assignments, dim) and add them up per token: (tokens, dim)."""
    return _Combine.apply(packed, weights, order)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each expert's rows of x (assignments, in) times its weight (experts, out, in)^T.

    counts: (experts,) rows of each expert, in order. Returns (assignments, out).
    """
    if x.device.type != "cpu":
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    return _GroupedLinear.apply(x, weight, _slices(counts))


def _slices(counts: Tensor) -> list[slice]:
    ends = counts.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.order.slots, grad, mode="sum"), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, weights: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(packed, weights)
        ctx.order = order
        # gathers, weighs and adds in one pass
        weights = weights.to(packed.dtype)
        return F.embedding_bag(order.slots, packed, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        packed, weights = ctx.saved_tensors
        order = ctx.order
        spread = grad.index_select(0, order.tokens)  # (assignments, dim)
        packed_weights = weights.flatten()[order.packed].unsqueeze(-1)
        dots = (spread * packed).sum(dim=-1, dtype=weights.dtype)  # the router's is often wider
        return spread.mul_(packed_weights.to(spread.dtype)), dots[order.slots], None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: list[slice]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        out = x.new_empty(len(x), weight.shape[1])
        for expert, rows in enumerate(groups):
            if rows.start < rows.stop:
                _mm(x[rows], weight[expert].T, out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for expert, rows in enumerate(ctx.groups):
            if grad_x is not None and rows.start < rows.stop:
                _mm(grad[rows], weight[expert], grad_x[rows])
            if grad_weight is not None:  # an expert without rows gets zeros
                torch.mm(_even(grad[rows]).T, _even(x[rows]), out=grad_weight[expert])
        return grad_x, grad_weight, None


def _mm(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """An expert's rows times a matrix, written into out."""
    if rows.dtype.itemsize > 2:
        torch.mm(rows, matrix, out=out)
    else:
        out.copy_(torch.mm(_even(rows), matrix)[: len(rows)])


def _even(rows: Tensor) -> Tensor:
    """In half precision rows of zeros at the end, up to a power of 2 or a multiple of 64.

    For each new shape oneDNN builds a kernel, which takes longer than the product itself, and an
    expert has another number of rows at every step. In decoding it has one, which stays alone.
    """
    if rows.dtype.itemsize > 2 or len(rows) == 0:
        return rows
    even = min(64, 1 << (len(rows) - 1).bit_length())
    return F.pad(rows, (0, 0, 0, -len(rows) % even))
