"""Whether anybody has changed or hooked modules that native code passes by."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class Watch:
    """Modules as they are now: settings, children, tensors and where those lie, and no hooks.

    It is asked for every token, so it compares dictionaries whole: Python does that at once.
    """

    def __init__(self, caller: nn.Module, passed: Iterable[nn.Module]):
        """passed: modules whose forward is not called, nor that of any inside; caller: whose is."""
        modules = [m for each in passed for m in each.modules()]
        configs = {id(c): vars(c) for m in modules if (c := vars(m).get("config")) is not None}
        held = [each for m in modules for each in (m._modules, m._parameters, m._buffers) if each]
        own = [vars(caller), caller._modules]
        self._now = [*own, *map(vars, modules), *configs.values(), *held]
        self._then = [dict(each) for each in self._now]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        tensors = [t for each in held for t in each.values() if isinstance(t, Tensor)]
        self._tensors, self._places = tensors, _places(tensors)

    def unchanged(self) -> bool:
        """Whether all is as it was, and nobody looks."""
        try:
            same = self._now == self._then
        except (RuntimeError, ValueError):  # tensors that are not the same one
            return False
        return same and not any(self._hooks) and _places(self._tensors) == self._places


def _places(tensors: list[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]
