"""Linears on packed weights: a module, and functions for one or several that share their input.

Forward runs on the native kernels where they are there, else on float32 copies of a few rows at a
time. Backward goes through the same weights as numbers; they are never trained.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from expertly.errors import ExpertlyError
from expertly.kernels.native import Library, library
from expertly.kernels.packed import PackedWeight, dequantize_rows, row_chunks

_CHUNK = 32  # inputs that the kernels give one scale


class PackedModule(nn.Module):
    """A module whose packed weights keep their bits when the model is cast to another dtype."""

    def hold(self, name: str, weight: PackedWeight) -> None:
        """Keep a packed weight as self.name and its tensors as buffers."""
        for part in ("data", "scales", "zeros"):
            self.register_buffer(f"{name}_{part}", getattr(weight, part))
        setattr(self, name, weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        mine = any(f"{prefix}{name}" in state_dict for name in self._buffers)
        if mine and local_metadata.get("assign_to_params_buffers"):
            why = "packed weights are copied into their place"
            raise ExpertlyError("E202", "load_state_dict", why, fix="leave assign=True out")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        tried = fn(torch.zeros(1, dtype=torch.uint8, device="cpu"))
        if tried.device.type != "cpu":
            why = "packed weights run on the CPU"
            raise ExpertlyError("E202", "device", why, fix="leave the model there")
        if tried.is_shared():  # by share_memory(), which moves tensors in place
            for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
                fn(tensor)
        return self


class PackedLinear(PackedModule):
    """nn.Linear on a packed weight (out, in): (.., in) to (.., out), in the input's dtype."""

    weight: PackedWeight

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.hold("weight", weight)
        bias = None if bias is None else bias.detach().float().contiguous()
        # asks for no gradient until someone wants it
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias, exact=self.training)

    def extra_repr(self) -> str:
        weight = self.weight
        bits = f"bits={weight.bits}, group_size={weight.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}"


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """x (.., in) times a packed matrix (out, in)^T, plus a float32 bias (out,): (.., out).

    exact: as in packed_linears.
    """
    return packed_linears(x, [weight], [bias], exact=exact)[0]


def packed_linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    *,
    exact: bool = False,
) -> list[Tensor]:
    """Several linears of one input, which is then quantised once: (.., in) to (.., out) each.

    exact: take what rounding x to 8 bits leaves into a second product, as training does.
    Differentiable by x and the biases. Under autocast in its dtype, as torch's linear.
    """
    x = x.to(compute_dtype(x))
    if torch.is_grad_enabled() and _asks_gradient(x, biases):
        return list(_PackedLinears.apply(x, weights, exact, *biases))
    return _linears(x, weights, biases, exact=exact)


def grouped_packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, counts: Tensor, *, exact: bool = False
) -> Tensor:
    """Each expert's rows of x (assignments, in) times its packed weight: (assignments, out).

    bias: (experts, out) float32; counts: (experts,) int64 rows of each expert, in order. exact: as
    in packed_linears. Differentiable by x.
    """
    return _GroupedPackedLinear.apply(x, weight, bias, counts, exact)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear of x answers in: x's own, or autocast's, which leaves float64 alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def native_for(x: Tensor) -> Library | None:
    """The native kernels, where they are built and x is of no finer dtype than they compute in."""
    return None if x.dtype == torch.float64 else library()


def readable(x: Tensor) -> Tensor:
    """x in a dtype that the native kernels read."""
    return x.float() if x.dtype == torch.float16 else x


def _asks_gradient(x: Tensor, biases: Sequence[Tensor | None]) -> bool:
    return x.requires_grad or any(bias is not None and bias.requires_grad for bias in biases)


class _PackedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[PackedWeight],
        exact: bool,
        *biases: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.weights, ctx.x = weights, Like(x.shape, x.dtype)
        return tuple(_linears(x, weights, biases, exact=exact))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            parts = zip(flat, ctx.weights, strict=True)
            total = sum(_matmul_back(grad, weight, 0) for grad, weight in parts)
            grad_x = total.view(ctx.x.shape).to(ctx.x.dtype)  # type: ignore[union-attr]
        asked = ctx.needs_input_grad[3:]
        biases = [g.sum(0).float() if a else None for g, a in zip(flat, asked, strict=True)]
        return grad_x, None, None, *biases


class Like(NamedTuple):
    """What a gradient must look like."""

    shape: torch.Size
    dtype: torch.dtype


class _GroupedPackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        counts: Tensor,
        exact: bool,
    ) -> Tensor:
        ctx.weight, ctx.counts = weight, counts
        native = native_for(x)
        if native is not None:
            first, *rest = _terms(readable(x), exact and weight.bits < 16)
            out = native.grouped_linear(weight, bias, first, counts)
            for term in rest:
                out += native.grouped_linear(weight, None, term, counts)
            return out.to(x.dtype)
        out = x.new_empty(len(x), weight.shape[-2])
        for expert, rows in _groups(counts):
            out[rows] = _matmul(x[rows], weight, expert, None if bias is None else bias[expert])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_x = grad.new_empty(len(grad), ctx.weight.shape[-1])
        for expert, rows in _groups(ctx.counts):
            grad_x[rows] = _matmul_back(grad[rows], ctx.weight, expert)
        return grad_x, None, None, None, None


def _terms(x: Tensor, exact: bool) -> list[Tensor]:
    """x, or in two terms: what the kernels round it to, 32 numbers at a time, and the rest."""
    if not exact:
        return [x]
    chunks = x.float().unflatten(-1, (-1, _CHUNK))
    top = chunks.abs().amax(dim=-1, keepdim=True)
    levels = (chunks * torch.where(top > 1e-30, top.new_tensor(127.0) / top, 0)).round_()
    rounded = (levels * (top / 127)).flatten(-2)
    return [rounded, x.float() - rounded]


def _linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    *,
    exact: bool = False,
) -> list[Tensor]:
    native = native_for(x)
    if native is not None:
        rounds = any(weight.bits < 16 for weight in weights)
        first, *rest = _terms(readable(x), exact and rounds)
        outs = native.linears(weights, biases, first)
        for term in rest:
            more = native.linears(weights, [None] * len(weights), term)
            outs = [one.add_(other) for one, other in zip(outs, more, strict=True)]
        return [out.to(x.dtype) for out in outs]
    flat, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    pairs = zip(weights, biases, strict=True)
    outs = [_matmul(flat, weight, 0, bias) for weight, bias in pairs]
    return [out.to(x.dtype).view(*lead, out.shape[-1]) for out in outs]


def _matmul(x: Tensor, weight: PackedWeight, expert: int, bias: Tensor | None) -> Tensor:
    """x (rows, in) times one packed matrix transposed, in float32 or wider: (rows, out)."""
    x = x.to(_wide(x))
    out = x.new_empty(len(x), weight.shape[-2])
    with torch.autocast(x.device.type, enabled=False):
        for chunk in row_chunks(*weight.shape[-2:]):
            out[:, chunk] = x @ dequantize_rows(weight, expert, chunk).to(x.dtype).T
    return out if bias is None else out.add_(bias)


def _matmul_back(grad: Tensor, weight: PackedWeight, expert: int) -> Tensor:
    """grad (rows, out) times one packed matrix, in float32 or wider: (rows, in)."""
    grad = grad.to(_wide(grad))
    total = grad.new_zeros(len(grad), weight.shape[-1])
    with torch.autocast(grad.device.type, enabled=False):
        for chunk in row_chunks(*weight.shape[-2:]):
            matrix = dequantize_rows(weight, expert, chunk).to(grad.dtype)
            total.addmm_(grad[:, chunk], matrix)
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _groups(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, with them."""
    ends = counts.cumsum(0).tolist()
    for expert, (start, end) in enumerate(pairwise([0, *ends])):
        if start < end:
            yield expert, slice(start, end)
