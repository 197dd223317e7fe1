"""A decoder layer of one new token in one native call, where each of its parts is a lean one.

For layers as most families have them: norm, attention, norm, experts or another block, each half
added to what came in. Where the block is more than a router and packed experts, it is called as it
is, behind the native half. A layer that does anything else (scaled residuals, norms behind its
halves) answers differently when it is tried, and keeps its own forward. So do prompts, and layers
inside which anybody watches or has changed something.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from expertly.kernels.native import Library, library
from expertly.kernels.native_layers import ExpertsPart, LayerParts, NativeLayers, NormPart
from expertly.kernels.native_ops import AttentionForm, Room
from expertly.kernels.packed_experts import PackedExperts, known_gate
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.cache import GrowingLayer, growing, growing_layer
from expertly.models.lean_attention import PROJECTIONS, LeanAttention
from expertly.models.lean_forward import (
    LeanForward,
    guarded,
    hooked,
    lean_of,
    plain,
    random,
    settings_of,
)
from expertly.models.lean_norm import LeanNorm
from expertly.models.lean_router import MOST, LeanRouter
from expertly.models.lean_watch import Watch

_NORMS = ("input_layernorm", "post_attention_layernorm")
_BLOCKS = ("mlp", "block_sparse_moe")
_PAST = 5  # tokens in the cache when a layer is tried


class LeanLayer(LeanForward):
    """One token's way through a decoder layer.

    block: the name of what follows the second norm; whole: that it is part of the native call.
    """

    looked_up = staticmethod(library)

    def __init__(self, native: Any, block: str, whole: bool):
        self.native, self.block, self.whole = native, block, whole
        self.kept: tuple[torch.dtype, Watch, NativeLayers] | None = None

    def bind(self, module: nn.Module) -> None:
        super().bind(module)
        self.remember(module)

    def remember(self, module: nn.Module) -> None:
        """Take the module's numbers and switches as those it is tried with."""
        self.settings = settings_of(module)
        self.block_settings = settings_of(module.get_submodule(self.block))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": None}  # it points into the tensors of this one

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        answer = self.decoded(module, args[0], kwargs) if len(args) == 1 else None
        return type(module).forward(module, *args, **kwargs) if answer is None else answer

    def decoded(self, module: Any, x: Any, given: dict[str, Any]) -> Tensor | None:
        """The native answer to x (batch, 1, dim); None where it is not a case for native code."""
        angles, cache = given.get("position_embeddings"), given.get("past_key_values")
        if not one_token(x) or given.get("attention_mask") is not None:
            return None
        layer = growing_layer(cache, module.self_attn.layer_idx)
        if layer is None or not isinstance(angles, tuple):
            return None
        native = self._ready(module, x)
        if native is None:
            return None
        length, room = layer.get_seq_length(), room_of(layer, one_key(native.parts[0].form, x))
        y, normed = native.decode(x, angles, [room], length)
        layer.advance()
        return y if self.whole else y + module._modules[self.block](normed)

    def _ready(self, module: Any, x: Tensor) -> NativeLayers | None:
        """The native call; None where anybody would miss a call of his own."""
        if self.kept is None or self.kept[0] is not x.dtype or not self.kept[1].unchanged():
            parts = self.parts(module, x)
            if parts is None:
                return None
            passed = ["self_attn", *_NORMS, *([self.block] if self.whole else [])]
            watch = Watch(module, [module._modules[name] for name in passed])
            self.kept = x.dtype, watch, NativeLayers(self.native, [parts])
        return self.kept[2]

    def parts(self, module: Any, x: Tensor) -> LayerParts | None:
        """What the native call is made of for inputs like x; None where it may not be made."""
        modules = module._modules
        before, behind = (_norm_part(modules[name], x.dtype) for name in _NORMS)
        attention, block = modules["self_attn"], modules[self.block]
        projections = [attention._modules[name] for name in PROJECTIONS]
        lean = lean_of(attention)
        if (
            before is None
            or behind is None
            or self.native is None
            or module.training
            or not self.unchanged(module)
            or hooked(attention)
            or not isinstance(lean, LeanAttention)
            or lean.dtype is not x.dtype
            or not lean.as_tried(attention)
            or any(type(each) is not PackedLinear for each in projections)
            or any(hooked(each) for each in attention._modules.values())
        ):
            return None
        experts = self._experts_part(block, x) if self.whole else None
        if self.whole and experts is None:
            return None
        own = [attention._modules[name].weight for name in lean.norms or ()]
        q_norm, k_norm = own or (None, None)
        weights, biases = tuple(p.weight for p in projections), tuple(p.bias for p in projections)
        return LayerParts((before, behind), weights, biases, lean.form, q_norm, k_norm, experts)

    def _experts_part(self, block: Any, x: Tensor) -> ExpertsPart | None:
        router, experts = _router_and_experts(block)
        lean = lean_of(router)
        if (
            hooked(block)
            or hooked(router)
            or hooked(experts)
            or not isinstance(lean, LeanRouter)
            or not lean.may(router, x)
            or not self.block_settings.items() <= vars(block).items()
            or experts.config._experts_implementation != "expertly"
        ):
            return None
        gate, packed = known_gate(experts), experts._modules.get("packed")
        bias = None if lean.bias is None else getattr(router, lean.bias)
        if gate is None or type(packed) is not PackedExperts or hooked(packed):
            return None
        if bias is not None and bias.dtype != torch.float32:
            return None
        stacks = packed.gate_up, packed.down, packed.gate_up_bias, packed.down_bias
        return ExpertsPart(lean.form, router.weight, bias, *stacks, gate)


def lean_layer(module: nn.Module, native: Library, dtype: torch.dtype) -> LeanLayer | None:
    """The lean forward that answers to the bit as a decoder layer's own does; None: it has none.

    dtype: the model's. What is inside must be lean already.
    """
    if not isinstance(lean_of(module._modules.get("self_attn")), LeanAttention):
        return None
    block = next((name for name in _BLOCKS if name in module._modules), None)
    if block is None or any(name not in module._modules for name in _NORMS):
        return None
    candidates = [LeanLayer(native, block, whole) for whole in (True, False)]
    return next((lean for lean in candidates if guarded(_tried, module, lean, dtype)), None)


def _tried(module: Any, lean: LeanLayer, dtype: torch.dtype) -> bool:
    """Whether one token behind some others gets the same answer and leaves the same cache."""
    lean.remember(module)
    attention, own = module.self_attn, type(module).forward
    x = random(1, _PAST + 1, attention.q_proj.in_features, dtype=dtype)
    angles = random(1, _PAST + 1, attention.head_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cache = growing(DynamicCache())

    def given(part: slice, cache: Any) -> dict[str, Any]:
        return {
            "attention_mask": None,
            "position_ids": torch.arange(_PAST + 1)[None, part],
            "past_key_values": cache,
            "use_cache": True,
            "position_embeddings": (cos[:, part], sin[:, part]),
        }

    past, new = slice(_PAST), slice(_PAST, None)
    own(module, x[:, past], **given(past, cache))
    copied = deepcopy(cache)
    ours = lean.decoded(module, x[:, new], given(new, cache))
    if ours is None:
        return False
    stock = own(module, x[:, new], **given(new, copied))
    keys, stock_keys = (each.layers[attention.layer_idx].keys for each in (cache, copied))
    return ours.equal(stock) and keys.equal(stock_keys)


def _norm_part(module: Any, dtype: torch.dtype) -> NormPart | None:
    """A lean norm as the native call takes it: one that answers in the dtype that comes in."""
    lean = lean_of(module)
    if not isinstance(lean, LeanNorm) or hooked(module) or not lean.unchanged(module):
        return None
    weight = module._parameters["weight"]
    if (dtype, weight.dtype) != (lean.dtype, lean.weight_dtype) or not weight.is_contiguous():
        return None
    if not lean.once and weight.dtype is not dtype and dtype != torch.float32:
        return None
    return NormPart(weight, lean.eps, lean.offset, lean.once)


def _router_and_experts(block: Any) -> tuple[Any, Any]:
    """The two modules of a block; LookupError where they are not all there is."""
    experts = block._modules["experts"]
    (router,) = (each for each in block._modules.values() if each is not experts)
    return router, experts


def one_token(x: Any) -> bool:
    """Whether native layers take an input: (batch, 1, dim), a few sequences' next tokens."""
    return (
        isinstance(x, Tensor)
        and x.dim() == 3
        and x.shape[1] == 1
        and len(x) <= MOST
        and plain(x)
        and x.is_contiguous()
    )


def one_key(form: AttentionForm, x: Tensor) -> Tensor:
    """Something of the shape of one token's keys or values, for each sequence in x."""
    return x.new_empty(len(x), form.kv_heads, 1, form.head_dim)


def room_of(layer: GrowingLayer, like: Tensor) -> Room:
    """Room for one more token with keys and values like these."""
    room = layer.room(like, like)
    assert room is not None
    return room
