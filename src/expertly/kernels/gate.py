"""The gate of a gated expert: SwiGLU as one step, every other through the module's own code."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SILU = ("SiLU", "SiLUActivation")  # torch's class, and transformers' for the same function
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def apply_gate(experts: Any, inner: Tensor) -> Tensor:
    """act(gate) * up of an experts module: (assignments, 2 x width) to (assignments, width)."""
    return swiglu(inner) if _is_swiglu(experts) else experts._apply_gate(inner)


def swiglu(inner: Tensor) -> Tensor:
    """silu(gate) * up, where inner (rows, 2 x width) holds the gate first: (rows, width).

    To the last bit what autograd computes; but both gradients are written straight into one
    tensor, which autograd would join from two.
    """
    return _SwiGLU.apply(inner)


def _is_swiglu(experts: Any) -> bool:
    """Whether the gate is transformers' own with a SiLU that nobody looks at (expert dropout)."""
    if experts._apply_gate.__name__ != "_default_apply_gate":
        return False
    act = experts.act_fn
    return type(act).__name__ in _SILU and not is_hooked(act)


def is_hooked(module: nn.Module) -> bool:
    """Whether someone looks at the module's calls."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(inner, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        inner, activated = ctx.saved_tensors
        gate, up = inner.chunk(2, dim=-1)
        grad_inner = torch.empty_like(inner)
        grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_inner
