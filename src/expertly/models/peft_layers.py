"""PEFT's layers, as far as ours must differ: experts add their own terms, packed weights stay.

Import it only where PEFT is known to be there.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.kernels.low_rank import LowRank
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.experts import EXPERTS
from expertly.models.layers import MoeLayer, bare
from expertly.models.packing import is_packed

ADAPTER = "default"  # PEFT's name for the only one


class ExpertTerm(ParamWrapper):
    """PEFT's wrapper of a stack of experts, whose term our experts function adds by itself.

    PEFT adds B A to the whole stack before each forward, and its gradient is of that size, too.
    It still does where experts run on another back-end than ours.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if bare(self).config._experts_implementation != EXPERTS:
            return super().forward(x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def factors(self) -> LowRank | None:
        """What is added to the stack, in (experts, out, in); None while it is switched off."""
        if self.disable_adapters or self.merged:
            return None
        a: Any = self.lora_A[ADAPTER].weight
        b: Any = self.lora_B[ADAPTER].weight
        by_expert = a.reshape(self.num_experts, -1, a.shape[-1])
        # PEFT keeps B as (out, rank x experts), the expert last
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1).contiguous()
        return LowRank(by_expert, b, self.scaling[ADAPTER])


class PackedLora(Linear):
    """PEFT's low-rank adapter beside a packed linear."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        linear: Any = self.get_base_layer()
        return linear.in_features, linear.out_features

    def _move_adapter_to_device_of_base_layer(self, *_: Any, **__: Any) -> None:
        """They are made where packed weights are, on the CPU."""


def lora_config(**said: Any) -> LoraConfig:
    """PEFT's config of an adapter on a decoder."""
    return LoraConfig(task_type="CAUSAL_LM", **said)


def inject(model: PreTrainedModel, layers: list[MoeLayer], config: LoraConfig) -> None:
    """Let PEFT put its layers in, in float32; only they ask for gradients afterwards.

    layers: MoE layers whose experts may be packed. Raises ValueError when nothing matches.
    """
    config._register_custom_module({PackedLinear: PackedLora})
    with _findable(model, layers), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on layers that PEFT does not know, which are ours
        inject_adapter_in_model(config, model, ADAPTER)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for part in (module.lora_A, module.lora_B):
                part.float()
    if is_packed(model):  # their kernels round inputs that ask for no gradient to 8 bits
        model.enable_input_require_grads()
    _give_terms(model, layers)


def _give_terms(model: PreTrainedModel, layers: list[MoeLayer]) -> None:
    """Tell experts and routers of the terms around them, in a plain dict: they are registered."""
    around: dict[int, dict[str, ParamWrapper]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            around.setdefault(id(bare(module)), {})[module.parameter_name] = module
    for layer in layers:
        if terms := around.get(id(layer.experts)):
            for term in terms.values():
                term.__class__ = ExpertTerm
            layer.experts.low_rank = terms
        if terms := around.get(id(layer.router)):  # small: PEFT's own arithmetic will do
            layer.router.low_rank = terms


@contextmanager
def _findable(model: PreTrainedModel, layers: list[MoeLayer]) -> Iterator[None]:
    """Gives packed weights what PEFT looks for, for a while.

    Packed experts get parameters of their shapes and no size, packed linears a tensor of their
    place: at more PEFT does not look.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for linear in linears:
        vars(linear)["qweight"] = linear.weight.data
    packed = [layer.experts for layer in layers if hasattr(layer.experts, "packed")]
    for experts in packed:
        for name, shape in _shapes(experts).items():
            nothing = torch.zeros(()).expand(shape)
            experts.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
    try:
        yield
    finally:
        for linear in linears:
            del vars(linear)["qweight"]
        for experts in packed:
            for name in _shapes(experts):
                delattr(experts, name)


def _shapes(experts: Any) -> dict[str, tuple[int, ...]]:
    """Of the stacks that packed experts stand for, in their family's layout."""
    packed = experts.packed
    first = "gate_up_proj" if packed.gated else "up_proj"
    inner = (1 + packed.gated) * packed.hidden
    shapes = {first: (inner, packed.dim), "down_proj": (packed.dim, packed.hidden)}
    turned = -1 if experts.is_transposed else 1
    return {name: (packed.num_experts, *shape[::turned]) for name, shape in shapes.items()}


@torch.no_grad()
def fold(model: PreTrainedModel, layers: list[MoeLayer]) -> None:
    """Add every adapter to its weights, by PEFT's own arithmetic, and take its layers out again.

    Raises ValueError for weights that are not finite then.
    """
    outer = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not name.endswith(".base_layer")
    ]
    for name, module in outer:
        inner: Any = module
        while isinstance(inner, LoraLayer):
            inner.merge(safe_merge=True)
            inner = inner.base_layer
        model.set_submodule(name, inner)
    for layer in layers:
        for part in (layer.experts, layer.router):
            vars(part).pop("low_rank", None)
    del model.peft_config
