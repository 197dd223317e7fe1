"""Whether anybody has changed or hooked modules that native code passes by."""

from collections.abc import Iterable
from operator import getitem
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_BASE = vars(nn.Module()).keys() - {"training"}  # what every module has, and nobody replaces


class Watch:
    """Modules as they are now: settings, children, tensors and where those lie, and no hooks.

    It is asked for every token, so it compares lists whole: Python does that at once.
    """

    def __init__(self, caller: nn.Module, passed: Iterable[nn.Module]):
        """passed: modules whose forward is not called, nor that of any inside; caller: whose is."""
        modules = [m for each in passed for m in each.modules()]
        configs = {id(c): vars(c) for m in modules if (c := vars(m).get("config")) is not None}
        held = [each for m in modules for each in (m._modules, m._parameters, m._buffers)]
        # a forward of its own, say, may be new there; what else is held is not asked for
        self._growing = [vars(caller), *map(vars, modules), *configs.values()]
        self._growing += [m._modules for m in modules if isinstance(m, nn.ModuleList)]
        self._sizes = [*map(len, self._growing)]
        dicts = [*self._growing, caller._modules, *held]
        pairs = [(each, name) for each in dicts for name in each if name not in _BASE]
        self._holders, self._names = zip(*pairs, strict=True)
        self._values = self._looked_up()
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        tensors = [t for each in held for t in each.values() if isinstance(t, Tensor)]
        self._tensors, self._places = tensors, _places(tensors)

    def unchanged(self) -> bool:
        """Whether all is as it was, and nobody looks."""
        try:
            same = self._looked_up() == self._values
        except (LookupError, RuntimeError, ValueError):  # gone, or other tensors
            return False
        as_long = [*map(len, self._growing)] == self._sizes
        return same and as_long and not any(self._hooks) and _places(self._tensors) == self._places

    def _looked_up(self) -> list[Any]:
        return [*map(getitem, self._holders, self._names)]


def _places(tensors: list[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]
