"""A KV cache that grows in steps, so that a new token is written and the past stays where it is.

transformers' own layer joins past and new with torch.cat: every token copies the whole past. Here
each layer keeps room behind it, and takes a quarter more when that is full. Layers of another kind
(sliding windows, linear attention) stay as transformers makes them; with gradients, and on another
device than the CPU, so do these.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from expertly.kernels.native_ops import Room

_LEAST = 64  # tokens more than there are that a layer gets room for, and
_SHARE = 4  # at least one in so many
_TOKENS = ("keys", "values", "_loose", "_storage", "_room", "_length")


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (batch, kv_heads, tokens, head_dim): views of storage with room.

    Whoever sets `keys` and `values` himself (reordering, cropping, moving) may do so: the next
    update copies them into storage again, so that no view held from before ever changes.
    """

    _storage: tuple[Tensor, Tensor] | None = None  # (batch, kv_heads, room, head_dim) each
    _room: Room | None = None  # the same, for the native attention; None where it cannot be
    _length = 0  # tokens in the storage

    @property
    def keys(self) -> Tensor | None:
        return self._part(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._set(0, keys)

    @property
    def values(self) -> Tensor | None:
        return self._part(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._set(1, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put tokens behind the others; all keys and all values, each a view."""
        if torch.is_grad_enabled() or not key_states.is_cpu:
            return super().update(key_states, value_states, *args, **kwargs)  # never in place
        length, count = self.get_seq_length(), key_states.shape[-2]
        keys, values = self._with_room(length + count, key_states, value_states)
        keys.narrow(2, length, count).copy_(key_states)
        values.narrow(2, length, count).copy_(value_states)
        self._length = length = length + count
        return keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def room(self, keys: Tensor, values: Tensor) -> Room | None:
        """Storage with room for one more token like these, (batch, kv_heads, _, head_dim).

        None where keys and values are not of one shape. Call advance once the token is written.
        """
        self._with_room(self.get_seq_length() + 1, keys, values)
        return self._room

    def advance(self) -> None:
        """Count a token that has been written into the room."""
        self._length += 1

    def get_seq_length(self) -> int:
        """How many tokens are there."""
        return super().get_seq_length() if self._storage is None else self._length

    def __copy__(self) -> "GrowingLayer":
        """A layer of the same tokens: neither sees what the other is given from now on."""
        made = _bare(vars(self))
        made._loose = [self.keys, self.values]
        return made

    def _part(self, index: int) -> Tensor | None:
        if self._storage is None:
            return self._loose[index]
        return self._storage[index].narrow(2, 0, self._length)

    def _set(self, index: int, tensor: Tensor | None) -> None:
        if self._storage is not None:
            self._loose = [self.keys, self.values]
            self._storage = self._room = None
        vars(self).setdefault("_loose", [None, None])[index] = tensor

    def _with_room(self, tokens: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Storage for so many tokens, those that are there at its beginning."""
        storage = self._storage
        if storage is not None and tokens <= storage[0].shape[2] and _may_write(storage[0]):
            return storage
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        length, size = self.get_seq_length(), tokens + max(_LEAST, tokens // _SHARE)
        made = _grown(self.keys, keys, size), _grown(self.values, values, size)
        alike = made[0].shape == made[1].shape and made[0].dtype == made[1].dtype
        self._storage, self._length = made, length
        self._room = Room(*made) if alike else None
        return made


def _may_write(storage: Tensor) -> bool:
    """Tensors made under inference_mode are read-only outside of it."""
    return torch.is_inference_mode_enabled() or not storage.is_inference()


def _grown(old: Tensor | None, like: Tensor, size: int) -> Tensor:
    batch, heads, _, dim = like.shape
    storage = like.new_empty(batch, heads, size, dim)
    if old is not None and old.numel():
        storage.narrow(2, 0, old.shape[2]).copy_(old)
    return storage


def growing(cache: Any) -> Any:
    """A cache whose plain layers grow in steps from now on, those that hold tokens included."""
    if type(cache) is not DynamicCache or cache.offloading:
        return cache
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _like(layer)
    return cache


def growing_layer(cache: Any, index: int) -> GrowingLayer | None:
    """A cache's layer, if it grows in steps and stays where it is."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if type(layer) is GrowingLayer and not cache.offloading else None


def grow_cache(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: the cache that a model is called with grows in steps."""
    if kwargs.get("past_key_values") is not None:
        growing(kwargs["past_key_values"])


def _like(layer: DynamicLayer) -> GrowingLayer:
    """A growing layer with the tokens of another."""
    made = _bare(vars(layer))
    made.keys, made.values = layer.keys, layer.values
    return made


def _bare(held: dict[str, Any]) -> GrowingLayer:
    """A layer with the attributes of another, but for its tokens."""
    made = GrowingLayer()
    vars(made).update({key: value for key, value in held.items() if key not in _TOKENS})
    return made
