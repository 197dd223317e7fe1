"""All decoder layers of one new token in one native call, where each of them is a lean one.

For models as most families have them: embedding, rotary angles, layers, norm. Windows, and
whoever asks for more than the last layer's answer, get the stock code.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from expertly.kernels.native import Library, library
from expertly.kernels.native_layers import LayerParts, NativeLayers
from expertly.models.cache import GrowingLayer, growing, growing_layer
from expertly.models.lean_forward import LeanForward, guarded, hooked, lean_of, settings_of
from expertly.models.lean_layer import LeanLayer, one_key, one_token, room_of
from expertly.models.lean_watch import Watch

_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_MORE = ("output_attentions", "output_hidden_states", "output_router_logits")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_TRIED = 6  # tokens that a stack is tried with


class LeanStack(LeanForward):
    """One token's way through a model's layers. answer: the class of what the model returns."""

    looked_up = staticmethod(library)

    def __init__(self, native: Library, answer: type):
        self.native, self.answer = native, answer
        self.kept: tuple[torch.dtype, Watch, NativeLayers] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": None}  # it points into the tensors of this one

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        answer = None if args else self.decoded(module, **kwargs)
        return type(module).forward(module, *args, **kwargs) if answer is None else answer

    def decoded(
        self,
        module: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> Any:
        """The model's answer to one token a sequence; None where it is not a case for native code.

        more: switches of the model's forward, all off.
        """
        asked = any(each is not None and each is not False for each in more.values())
        if asked or input_ids is None or input_ids.shape[1:] != (1,) or not _plainly(module.config):
            return None
        held = [growing_layer(past_key_values, index) for index in range(len(module.layers))]
        layers = [layer for layer in held if layer is not None]
        lengths = {layer.get_seq_length() for layer in layers}
        if len(layers) < len(held) or len(lengths) > 1 or not _sees_all(attention_mask):
            return None
        x = module.embed_tokens(input_ids)
        native = self._ready(module, x) if one_token(x) else None
        if native is None:
            return None
        if position_ids is None:
            position_ids = torch.tensor([[layers[0].get_seq_length()]])
        x = _decode(native, x, module.rotary_emb(x, position_ids), layers)
        return self.answer(last_hidden_state=module.norm(x), past_key_values=past_key_values)

    def _ready(self, module: Any, x: Tensor) -> NativeLayers | None:
        """The native call; None where anybody would miss a call of his own."""
        if self.kept is None or self.kept[0] is not x.dtype or not self.kept[1].unchanged():
            parts = [_parts(layer, x) for layer in module.layers]
            whole = [each for each in parts if each is not None and each.experts is not None]
            forms = {(each.form.kv_heads, each.form.head_dim) for each in whole}
            if self.native is None or len(whole) < len(parts) or len(forms) > 1:
                return None
            if not self.unchanged(module) or not _all_in_order(module):
                return None
            watch = Watch(module, [module.layers])
            self.kept = x.dtype, watch, NativeLayers(self.native, whole)
        return self.kept[2]


def lean_stack(module: nn.Module, native: Library, dtype: torch.dtype) -> LeanStack | None:
    """The lean forward that answers to the bit as a model without its head does; None: none does.

    Its layers must be lean already.
    """
    if not module._modules.keys() >= _PARTS or not isinstance(module.layers, nn.ModuleList):
        return None
    leans = [lean_of(layer) for layer in module.layers]
    if not leans or not all(isinstance(lean, LeanLayer) and lean.whole for lean in leans):
        return None
    return guarded(_tried, module, native) if _all_in_order(module) else None


def _tried(module: Any, native: Library) -> LeanStack | None:
    """The stack, if one token behind some others gets the same answer and leaves the same cache."""
    own, cache = type(module).forward, growing(DynamicCache())
    ids = torch.arange(_TRIED)[None] % module.embed_tokens.num_embeddings
    stock = own(module, input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    lean, copied = LeanStack(native, type(stock)), deepcopy(cache)
    lean.settings = settings_of(module)
    ours = lean.decoded(module, input_ids=ids[:, -1:], past_key_values=cache)
    stock = own(module, input_ids=ids[:, -1:], past_key_values=copied, use_cache=True)
    if ours is None or ours.keys() != stock.keys():
        return None
    keys, stock_keys = (each.layers[-1].keys for each in (cache, copied))
    same = ours.last_hidden_state.equal(stock.last_hidden_state) and keys.equal(stock_keys)
    return lean if same else None


def _decode(
    native: NativeLayers, x: Tensor, angles: tuple[Tensor, Tensor], layers: list[GrowingLayer]
) -> Tensor:
    like = one_key(native.parts[0].form, x)
    rooms = [room_of(layer, like) for layer in layers]
    y, _ = native.decode(x, angles, rooms, layers[0].get_seq_length())
    for layer in layers:
        layer.advance()
    return y


def _parts(layer: nn.Module, x: Tensor) -> LayerParts | None:
    """What a layer's native call is made of; None where the layer itself must be called."""
    lean = lean_of(layer)
    if not isinstance(lean, LeanLayer) or not lean.whole or hooked(layer):
        return None
    return lean.parts(layer, x)


def _plainly(config: Any) -> bool:
    """Whether a model's config asks for its answer alone, as an object."""
    return config.return_dict and not any(getattr(config, name, False) for name in _MORE)


def _sees_all(mask: Any) -> bool:
    """Whether a mask hides nothing; a caller may also give one for each kind of layer."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))


def _all_in_order(module: Any) -> bool:
    """Whether each layer sees all tokens, and has the place in the cache that it has here."""
    order = [layer.self_attn.layer_idx for layer in module.layers]
    all_asked = getattr(module.config, "num_hidden_layers", 0) >= len(order)
    return all_asked and order == [*range(len(order))] and not _windowed(module.config)


def _windowed(config: Any) -> bool:
    """Whether a token may not see all that came before."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    return bool(kinds) or any(getattr(config, name, None) is not None for name in _WINDOWS)
