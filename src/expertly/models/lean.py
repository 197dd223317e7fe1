"""Make a model's decoding lean: the Python between its matrices, not the matrices.

A stock decode step spends its time on hundreds of tiny operations. Here norms, routers and the
attention of one new token become one native call each; a layer of such parts becomes one call; and
so does a whole stack of such layers. The model stays a transformers class with
its own modules, names and hooks; only `forward` of some modules is another function. Each of them
is tried beside the stock forward first, on random numbers, and left alone where it does not answer
the same. For inference on a CPU; with gradients the stock code runs.
"""

from torch import inference_mode, nn
from transformers import PreTrainedModel

from expertly.kernels.native import library
from expertly.kernels.native_ops import operations
from expertly.models.cache import grow_cache
from expertly.models.lean_attention import lean_attention
from expertly.models.lean_forward import lean_of
from expertly.models.lean_layer import lean_layer
from expertly.models.lean_norm import lean_norm
from expertly.models.lean_router import lean_routers
from expertly.models.lean_stack import lean_stack


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
    for module in model.modules():
        norm = lean_norm(module, kernels, model.dtype)
        if norm is not None:
            norm.bind(module)
    for module in model.modules():  # after the norms, of which it asks
        attention = lean_attention(module, native, model.dtype)
        if attention is not None:
            attention.bind(module)
    for module in model.modules():  # of all these
        layer = lean_layer(module, kernels, model.dtype)
        if layer is not None:
            layer.bind(module)
    for module in model.modules():  # and of these
        stack = lean_stack(module, kernels, model.dtype)
        if stack is not None:
            stack.bind(module)


def undo_lean(model: nn.Module) -> None:
    """Give every module its own forward again, and the cache its own way to grow."""
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is grow_cache]:
        del hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        if lean_of(module) is not None:
            del module.forward
