"""RMSNorm in one native call (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertly.kernels.native import Library, library
from expertly.models.lean_forward import LeanForward, guarded, plain, random, same

_NUMBERS = 2048  # to try a norm on: of fewer, too few show how it rounds


class NormForm(NamedTuple):
    """Families multiply by the weight or by 1 + weight, and round once or twice."""

    offset: float
    once: bool


_FORMS = (NormForm(0.0, once=False), NormForm(0.0, once=True), NormForm(1.0, once=True))


class LeanNorm(LeanForward):
    """x / rms(x) * (weight + offset), for x and weight of the dtypes that it was tried with."""

    looked_up = staticmethod(library)

    def __init__(
        self, native: Library, eps: float, form: NormForm, dtypes: tuple[torch.dtype, torch.dtype]
    ):
        self.native, self.eps = native, eps
        self.offset, self.once = form
        self.dtype, self.weight_dtype = dtypes

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self.native is not None:
            x, weight = args[0], module._parameters["weight"]
            if (
                x.dtype is self.dtype
                and weight.dtype is self.weight_dtype
                and plain(x)
                and self.unchanged(module)
            ):
                return self.norm(x, weight)
        return type(module).forward(module, *args, **kwargs)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The native answer to x (.., dim)."""
        return self.native.rms_norm(x, weight, self.eps, self.offset, once=self.once)


def lean_norm(module: nn.Module, native: Library, dtype: torch.dtype) -> LeanNorm | None:
    """The lean forward that answers as an RMSNorm's own does to numbers of a dtype, if any.

    A module that cannot be called with them is no such norm.
    """
    if not _is_norm(module):
        return None
    return guarded(_tried, module, native, dtype)


def _tried(module: Any, native: Library, dtype: torch.dtype) -> LeanNorm | None:
    twin, x = with_drawn_weight(module), _inputs(len(module.weight), dtype)
    stock, dtypes = type(module).forward(twin, x), (dtype, module.weight.dtype)
    leans = (LeanNorm(native, _eps(module), form, dtypes) for form in _FORMS)
    return next((lean for lean in leans if same(lean.norm(x, twin.weight), stock)), None)


def _inputs(dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of a few sizes: beside the smallest, eps counts."""
    x = random(max(3, _NUMBERS // dim), dim, dtype=torch.float32)
    x[1::3] *= 1e-3
    x[2::3] *= 30
    return x.to(dtype)


def with_drawn_weight(norm: nn.Module) -> Any:
    """A norm like this one, its own forward and a random weight: ones would show little."""
    twin: Any = copy(norm)
    vars(twin).pop("forward", None)
    weight: Any = norm.weight
    drawn = 1 + random(*weight.shape, dtype=weight.dtype, seed=1) / 2
    vars(twin)["_parameters"] = {"weight": nn.Parameter(drawn, requires_grad=False)}
    return twin


def _is_norm(module: Any) -> bool:
    named = type(module).__name__.endswith("RMSNorm") and list(module._parameters) == ["weight"]
    return bool(
        named
        and module.weight is not None
        and module.weight.dim() == 1
        and plain(module.weight)
        and not any(module.children())
        and isinstance(_eps(module), float)
    )


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
