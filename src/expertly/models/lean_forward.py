"""What the lean forwards share: how one is bound to a module, and when the stock one must run."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from expertly.kernels.native_ops import TYPES

T = TypeVar("T")

_SETTINGS = (bool, int, float, str, type(None))
_NOT_SETTINGS = ("training",)  # changes by itself; who depends on it asks for it


class LeanForward:
    """A module's forward by native calls, which holds no module: it is bound to one.

    What it cannot do goes to the forward of the module's class. native: the calls, None where
    they are missing. It follows deepcopy and pickle, which look the calls up again.
    """

    native: Any
    settings: dict[str, Any]  # of the module, when it was tried

    def bind(self, module: nn.Module) -> None:
        """Put it in the place of the module's own forward."""
        self.settings = settings_of(module)
        module.forward = partial(self, module)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether the module's numbers and switches are those it was tried with."""
        return self.settings.items() <= vars(module).items()

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.native = self.looked_up()

    @staticmethod
    def looked_up() -> Any:
        """The native calls of this machine, None without the compiled library."""
        raise NotImplementedError


def lean_of(module: nn.Module | None) -> LeanForward | None:
    """The lean forward that is bound to a module, if any."""
    bound = getattr(vars(module).get("forward"), "func", None) if module is not None else None
    return bound if isinstance(bound, LeanForward) else None


def plain(x: Tensor) -> bool:
    """Whether native code may read a tensor: numbers of its types, on the CPU, without gradients.

    Autocast is for the stock code, which casts weights.
    """
    return (
        x.is_cpu
        and x.dtype in TYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def hooked(module: nn.Module) -> bool:
    """Whether anybody watches or changes what goes through a module: its hooks, all modules', or a
    forward put in its place that is not a lean one."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or ("forward" in vars(module) and lean_of(module) is None)
    )


def guarded(trial: Callable[..., T], *args: Any) -> T | None:
    """A trial's answer; None for a module that cannot be called like this, for we know none."""
    try:
        return trial(*args)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return None


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The same normal numbers every time, without touching torch's own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agree(ours: Tensor, stock: Tensor, part: float) -> bool:
    """Whether two answers differ by no more than a part of the largest number.

    Not of each number: where terms cancel, rounding is of the terms' size.
    """
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        return False
    far = (ours.float() - stock.float()).abs().max()
    return bool(far <= part * stock.float().abs().max())


def same(ours: Tensor, stock: Tensor) -> bool:
    """Whether two answers are the same numbers but for float32 sums in another order.

    Where nothing cancels. In bfloat16 that tips few numbers, and those to their neighbours.
    """
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        return False
    float32 = stock.dtype == torch.float32
    near = (ours.float() - stock.float()).abs() <= stock.float().abs() * ulps(
        8 if float32 else 1, stock.dtype
    )
    few = float32 or (ours != stock).float().mean() <= 0.01
    return bool(near.all() and few)


def ulps(count: float, dtype: torch.dtype) -> float:
    """So many units in the last place, as a part."""
    return count * torch.finfo(dtype).eps


def settings_of(module: nn.Module) -> dict[str, Any]:
    """A module's own numbers and switches."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _SETTINGS) and name not in _NOT_SETTINGS
    }
