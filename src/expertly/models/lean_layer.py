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

from expertly.kernels.native import address_of, library, pointer
from expertly.kernels.native_layer import ExpertsPart, LayerParts, NativeLayer, NormPart
from expertly.kernels.packed_experts import PackedExperts, known_gate
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.cache import GrowingLayer, growing
from expertly.models.lean_attention import PROJECTIONS, LeanAttention
from expertly.models.lean_forward import LeanForward, guarded, hooked, lean_of, random, settings_of
from expertly.models.lean_norm import LeanNorm
from expertly.models.lean_router import LeanRouter

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
        self.kept: tuple[tuple, NativeLayer] | None = None

    def bind(self, module: nn.Module) -> None:
        super().bind(module)
        self.block_settings = settings_of(getattr(module, self.block))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": None}  # it points into the tensors of this one

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self._cache_layer(module, args, kwargs) if self.native is not None else None
        parts = None if layer is None else self._parts(module, args[0])
        if parts is None:
            return type(module).forward(module, *args, **kwargs)
        return self._decode(module, args[0], kwargs["position_embeddings"], layer, parts)

    def _cache_layer(self, module: Any, args: tuple, given: dict[str, Any]) -> GrowingLayer | None:
        """Where the cache takes one new token; None: not a case for native code."""
        attention = module._modules["self_attn"]
        lean = lean_of(attention)
        if len(args) != 1 or not isinstance(lean, LeanAttention) or not self.unchanged(module):
            return None
        x = args[0]
        if hooked(attention) or not lean.as_tried(attention) or not x.is_contiguous():
            return None
        return lean.cache_layer(attention, {**given, "hidden_states": x})

    def _parts(self, module: Any, x: Tensor) -> LayerParts | None:
        """What the native call is made of; None where anybody would miss a call of his own."""
        modules = module._modules
        norms = [_norm_part(modules[name], x.dtype) for name in _NORMS]
        attention, block = modules["self_attn"], modules[self.block]
        projections = [attention._modules[name] for name in PROJECTIONS]
        if None in norms or any(type(p) is not PackedLinear or hooked(p) for p in projections):
            return None
        experts = self._experts_part(block, x) if self.whole else None
        if self.whole and experts is None:
            return None
        lean = lean_of(attention)
        assert isinstance(lean, LeanAttention)
        own = [attention._modules[name].weight for name in lean.norms or ()] or [None, None]
        return LayerParts(
            (norms[0], norms[1]),
            tuple(p.weight for p in projections),
            tuple(p.bias for p in projections),
            lean.form,
            *own,
            experts,
        )

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

    def _decode(
        self, module: Any, x: Tensor, angles: tuple, layer: GrowingLayer, parts: LayerParts
    ) -> Any:
        like = x.new_empty(len(x), parts.form.kv_heads, 1, parts.form.head_dim)
        room = layer.room(like, like)
        assert room is not None
        y, normed = self._native(parts).decode(x, angles, room, layer.get_seq_length())
        layer.advance()
        return y if self.whole else y + module._modules[self.block](normed)

    def _native(self, parts: LayerParts) -> NativeLayer:
        key = _places(parts)
        if self.kept is None or self.kept[0] != key:
            self.kept = key, NativeLayer(self.native, parts)
        return self.kept[1]


def lean_layer(module: nn.Module, native: Any, dtype: torch.dtype) -> LeanLayer | None:
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
    lean.settings = settings_of(module)
    lean.block_settings = settings_of(module._modules[lean.block])
    attention = module.self_attn
    x = random(1, _PAST + 1, attention.q_proj.in_features, dtype=dtype)
    angles = random(1, _PAST + 1, attention.head_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cache, own = growing(DynamicCache()), type(module).forward
    places = torch.arange(_PAST + 1)[None]

    def given(part: slice, cache: Any) -> dict[str, Any]:
        return {
            "attention_mask": None,
            "position_ids": places[:, part],
            "past_key_values": cache,
            "use_cache": True,
            "position_embeddings": (cos[:, part], sin[:, part]),
        }

    own(module, x[:, :_PAST], **given(slice(_PAST), cache))
    copied, last = deepcopy(cache), slice(_PAST, None)
    args, kwargs = (x[:, last],), given(last, cache)
    layer = lean._cache_layer(module, args, kwargs)
    parts = None if layer is None else lean._parts(module, args[0])
    if parts is None:
        return False
    ours = lean._decode(module, args[0], kwargs["position_embeddings"], layer, parts)
    stock = own(module, *args, **given(last, copied))
    keys, stock_keys = (each.layers[attention.layer_idx].keys for each in (cache, copied))
    return torch.equal(ours, stock) and torch.equal(keys, stock_keys)


def _norm_part(module: Any, dtype: torch.dtype) -> NormPart | None:
    """A lean norm as the native call takes it: one that answers in the dtype that comes in."""
    lean = lean_of(module)
    if not isinstance(lean, LeanNorm) or hooked(module) or not lean.unchanged(module):
        return None
    weight = module._parameters["weight"]
    if (dtype, weight.dtype) != (lean.dtype, lean.weight_dtype):
        return None
    if not lean.once and weight.dtype is not dtype and dtype != torch.float32:
        return None
    return NormPart(weight, lean.eps, lean.offset, lean.once)


def _router_and_experts(block: Any) -> tuple[Any, Any]:
    """The two modules of a block; LookupError where they are not all there is."""
    experts = block._modules["experts"]
    (router,) = (each for each in block._modules.values() if each is not experts)
    return router, experts


def _places(parts: LayerParts) -> tuple:
    """Where everything lies that the struct points to, and what it copies."""
    experts, norms = parts.experts, parts.norms
    own = (
        ()
        if experts is None
        else (
            *experts.form,
            experts.gate,
            experts.weight.data_ptr(),
            pointer(experts.bias),
            address_of(experts.gate_up),
            address_of(experts.down),
            pointer(experts.gate_up_bias),
            pointer(experts.down_bias),
        )
    )
    return (
        *(norm.weight.data_ptr() for norm in norms),
        *(address_of(weight) for weight in parts.projections),
        *(pointer(bias) for bias in parts.biases),
        pointer(parts.q_norm),
        pointer(parts.k_norm),
        *own,
    )
