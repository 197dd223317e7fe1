"""Make a model's decoding lean: the Python between its matrices, not the matrices.

A stock decode step spends its time on hundreds of tiny operations. Here norms, routers and the
attention of one new token become one native call each; a layer of such parts becomes one call; and
so does a whole stack of such layers. The model stays a transformers class with
its own modules, names and hooks; only `forward` of some modules is another function. Each of them
is tried beside the stock forward first, on random numbers, and left alone where it does not answer
the same. For inference on a CPU; with gradients the stock code runs.
"""

from collections.abc import Callable
from typing import Any

from torch import inference_mode, nn
from transformers import PreTrainedModel

from expertly.kernels.native import library
from expertly.kernels.native_ops import operations
from expertly.models.cache import grow_cache
from expertly.models.lean_attention import lean_attention
from expertly.models.lean_forward import LeanForward, lean_of
from expertly.models.lean_layer import lean_layer
from expertly.models.lean_norm import lean_norm
from expertly.models.lean_router import lean_routers
from expertly.models.lean_stack import LeanStack, lean_stack


@inference_mode()
def make_lean(model: PreTrainedModel) -> None:
    """Swap the forward of every module that has a lean one which answers the same.

    Call it once the weights are there. Without the compiled library, or on another device, only
    the cache that the model is called with grows in steps.
    """
    undo_lean(model)
    model.register_forward_pre_hook(grow_cache, with_kwargs=True)
    kernels, native = library(), operations()
    if kernels is None or native is None or model.device.type != "cpu":
        return
    for router, form in [*lean_routers(model, native)]:
        form.bind(router)
    makers: tuple[tuple[Callable[..., LeanForward | None], Any], ...] = (
        (lean_norm, kernels),
        (lean_attention, native),
        (lean_layer, kernels),
        (lean_stack, kernels),
    )  # each asks of those before it
    for make, calls in makers:
        for module in model.modules():
            lean = make(module, calls, model.dtype)
            if lean is not None:
                lean.bind(module)


def decodes_in_one_call(model: nn.Module) -> bool:
    """Whether all layers of a new token are one native call."""
    return any(isinstance(lean_of(module), LeanStack) for module in model.modules())


def undo_lean(model: nn.Module) -> None:
    """Give every module its own forward again, and the cache its own way to grow."""
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is grow_cache]:
        del hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        if lean_of(module) is not None:
            del module.forward
