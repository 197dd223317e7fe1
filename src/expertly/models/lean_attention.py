"""Attention of one new token in one native call between its projections.

For attention as most families have it: projections of queries, keys and values, perhaps norms of
the first two, a rotary embedding whose halves turn against each other, grouped queries. What a
module does is read from its parts and then tried: one that does anything else (gates, sinks, soft
caps, latents) answers differently and keeps its own forward. So do prompts, masks, windows, and
whoever watches the modules inside.
"""

import inspect
from collections.abc import Iterable, Iterator
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from expertly.kernels.native_ops import AttentionForm, New, Operations, operations
from expertly.kernels.packed_linear import PackedLinear, packed_linears
from expertly.models.cache import GrowingLayer, growing, growing_layer
from expertly.models.lean_forward import LeanForward, agree, guarded, hooked, lean_of, plain, random
from expertly.models.lean_norm import LeanNorm, with_drawn_weight

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ARGUMENTS = ["hidden_states", "position_embeddings", "attention_mask", "past_key_values"]
_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
_PAST = 5  # tokens in the cache when a form is tried
# what rounding may make of it, that of packed projections' int8 included
_ROUNDING = {torch.float32: 0.005, torch.bfloat16: 0.02}


class LeanAttention(LeanForward):
    """One token's attention by an AttentionForm; norms: the names of the two, if there are any.

    dtype: of what comes in, when it was tried.
    """

    looked_up = staticmethod(operations)

    def __init__(
        self,
        native: Operations,
        form: AttentionForm,
        norms: tuple[str, str] | None,
        dtype: torch.dtype,
    ):
        self.native, self.form, self.norms, self.dtype = native, form, norms, dtype
        self.passed = (*PROJECTIONS[:3], *(norms or ()))  # modules that are not called

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(_ARGUMENTS, args, strict=False), **kwargs)
        layer = self.cache_layer(module, given) if self.as_tried(module) else None
        if layer is None:
            return type(module).forward(module, *args, **kwargs)
        return self._attend(module, given["hidden_states"], given["position_embeddings"], layer)

    def cache_layer(self, module: Any, given: dict[str, Any]) -> GrowingLayer | None:
        """The layer of the cache that one new token goes to; None: not a case for native code."""
        x, angles, mask, cache = (given.get(name) for name in _ARGUMENTS)
        if (
            x is None
            or cache is None
            or self.native is None
            or x.dtype is not self.dtype
            or x.shape[1] != 1
            or mask is not None
            or not isinstance(angles, tuple)
            or not plain(x)
            or module.training
            or any(hooked(module._modules[name]) for name in self.passed)
        ):
            return None
        return growing_layer(cache, module.layer_idx)

    def as_tried(self, module: Any) -> bool:
        """Whether nobody has changed the module since, nor the norms that native code passes by."""
        config = vars(module.config)
        return (
            config.get("_attn_implementation_internal") == "sdpa"
            and (config.get("clip_qkv") or 0.0) == self.form.clip
            and self.unchanged(module)
            and all(_plain_norm(module._modules[name]) for name in self.norms or ())
        )

    def _attend(
        self, module: Any, x: Tensor, angles: tuple[Tensor, Tensor], layer: GrowingLayer
    ) -> tuple[Tensor, None]:
        q, k, v = _projected(module, x)
        like = k.view(len(x), self.form.kv_heads, 1, self.form.head_dim)
        room, length = layer.room(like, like), layer.get_seq_length()
        assert room is not None
        weights = [getattr(module, name).weight for name in self.norms or ()]
        out = self.native.attend(self.form, New(q, k, v, *angles), room, length, *weights)
        layer.advance()
        return module.o_proj(out.view(len(x), 1, -1)), None


def lean_attention(
    module: nn.Module, native: Operations, dtype: torch.dtype
) -> LeanAttention | None:
    """The lean forward that answers as an attention's own does; None: it has none.

    dtype: the model's. Norms inside must be lean already.
    """
    if not _is_attention(module):
        return None
    candidates = _candidates(module, native, dtype)
    return next((lean for lean in candidates if guarded(_tried, module, lean)), None)


def _is_attention(module: Any) -> bool:
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS):
        return False
    needed = ("layer_idx", "head_dim", "scaling", "config")
    arguments = list(inspect.signature(type(module).forward).parameters)[1:5]
    return arguments == _ARGUMENTS and all(getattr(module, n, None) is not None for n in needed)


def _candidates(module: Any, native: Operations, dtype: torch.dtype) -> Iterator[LeanAttention]:
    """What the module may do to queries and keys, by its parts."""
    dim = module.head_dim
    outs = [getattr(module, name).out_features for name in PROJECTIONS[:3]]
    if dim % 32 or any(out % dim for out in outs) or outs[1] != outs[2]:
        return  # native code takes 32 numbers at a time
    heads, kv_heads = outs[0] // dim, outs[1] // dim
    clip = getattr(module.config, "clip_qkv", None) or 0.0
    form = AttentionForm(heads, kv_heads, dim, float(module.scaling), float(clip))
    names = next((pair for pair in _NORMS if hasattr(module, pair[0])), None)
    if names is None:
        yield LeanAttention(native, form, None, dtype)
        return
    norms = [lean for name in names if (lean := _plain_norm(getattr(module, name)))]
    if len(norms) < 2 or norms[0].eps != norms[1].eps:
        return
    whole = getattr(module, names[0]).weight.numel() != dim
    for norm in ("all heads",) if whole else ("each head", "each rotated head"):
        yield LeanAttention(native, form._replace(norm=norm, eps=norms[0].eps), names, dtype)


def _plain_norm(module: Any) -> LeanNorm | None:
    """The lean norm bound to a module, if it is as it was tried and adds nothing to its weight."""
    lean = lean_of(module)
    if not isinstance(lean, LeanNorm) or lean.offset != 0 or not lean.unchanged(module):
        return None
    weight = module._parameters["weight"]
    return lean if weight.dtype is lean.weight_dtype and weight.is_contiguous() else None


def _with_drawn_norms(module: Any, names: Iterable[str]) -> Any:
    """The same module, but for the weights of its norms."""
    twin = copy(module)
    norms = {name: with_drawn_weight(getattr(module, name)) for name in names}
    vars(twin)["_modules"] = {**module._modules, **norms}
    return twin


def _tried(module: Any, lean: LeanAttention) -> bool:
    """Whether one token behind some others gets the same answer and leaves the same cache."""
    module, dtype = _with_drawn_norms(module, lean.norms or ()), lean.dtype
    x = random(1, _PAST + 1, module.q_proj.in_features, dtype=dtype)
    angles = random(1, _PAST + 1, module.head_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cache, own = growing(DynamicCache()), type(module).forward
    own(module, x[:, :-1], (cos[:, :-1], sin[:, :-1]), None, cache)
    copied, angle = deepcopy(cache), (cos[:, -1:], sin[:, -1:])
    given = dict(zip(_ARGUMENTS, (x[:, -1:], angle, None, cache), strict=True))
    layer = lean.cache_layer(module, given)
    if layer is None:
        return False
    ours = lean._attend(module, x[:, -1:], angle, layer)[0]
    stock = own(module, x[:, -1:], angle, None, copied)[0]
    keys, stock_keys = (each.layers[module.layer_idx].keys for each in (cache, copied))
    most = _ROUNDING[dtype]
    return agree(keys, stock_keys, most) and agree(ours, stock, most)


def _projected(module: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values of x; the input of packed projections is quantised once."""
    three = [module.q_proj, module.k_proj, module.v_proj]
    if all(type(each) is PackedLinear for each in three):
        return packed_linears(x, [p.weight for p in three], [p.bias for p in three])
    return [projection(x) for projection in three]
