"""A whole decoder layer for one new token per sequence, in one native call.

What stands between two calls from Python, and between two teams of threads, costs more than a small
layer's arithmetic. The C++ is in cpu/layer.cpp, and runs what the single calls of native.py and
native_ops.py run. Forward only, on the CPU, in float32 or bfloat16.
"""

from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.kernels import native_abi as abi
from expertly.kernels.native import TYPES, Gate, Library, address_of, gate_of, pointer
from expertly.kernels.native_ops import (
    AttentionForm,
    Room,
    RouterForm,
    attention_of,
    decoding_of,
    router_of,
)
from expertly.kernels.packed import PackedWeight


class NormPart(NamedTuple):
    """An RMSNorm as Library.rms_norm takes it."""

    weight: Tensor  # (dim,)
    eps: float
    offset: float
    once: bool


class ExpertsPart(NamedTuple):
    """A router and its experts, as Operations.route and Library.experts take them."""

    form: RouterForm
    weight: Tensor  # (experts, dim)
    bias: Tensor | None  # (experts,) float32
    gate_up: PackedWeight
    down: PackedWeight
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Gate


class LayerParts(NamedTuple):
    """x + attention(norm(x)), then that + experts(norm(that))."""

    norms: tuple[NormPart, NormPart]
    projections: tuple[PackedWeight, ...]  # of queries, keys, values, and the output's
    biases: tuple[Tensor | None, ...]
    form: AttentionForm
    q_norm: Tensor | None
    k_norm: Tensor | None
    experts: ExpertsPart | None  # None: the layer ends behind its second norm


class NativeLayer:
    """A layer's parts, kept together with the struct that points into them."""

    def __init__(self, library: Library, parts: LayerParts):
        self._library, self.parts = library, parts
        self._decode = abi.typed(library.handle, "decode_layer")
        self._layer = _layer_of(parts)

    def decode(
        self, x: Tensor, angles: tuple[Tensor, Tensor], room: Room, length: int
    ) -> tuple[Tensor, Tensor]:
        """x (batch, 1, dim) through the layer: its answer, and the second norm's.

        angles: cosines and sines (batch or 1, 1, rotated). The token is put behind the `length`
        that are in the cache. Raises ValueError for tensors that do not fit one another.
        """
        cos, sin = angles
        for each in (x, cos, sin):
            if each.dtype is not room.dtype or not each.is_contiguous():
                raise ValueError("a layer's tensors must be contiguous and of the cache's dtype")
        form, (batch, _, dim) = self.parts.form, x.shape
        if (batch, form.kv_heads, form.head_dim) != (room.batch, room.kv_heads, room.head_dim):
            raise ValueError("the cache does not fit the layer's heads")
        if dim != self.parts.projections[0].shape[-1] or cos.shape != sin.shape:
            raise ValueError(f"x is {tuple(x.shape)}, its angles {tuple(cos.shape)}")
        now, y, normed = decoding_of(cos, sin, room, length), torch.empty_like(x), torch.empty_like(x)
        code = self._decode(
            self._library.isa,
            torch.get_num_threads(),
            byref(self._layer),
            byref(now),
            x.data_ptr(),
            TYPES[x.dtype],
            batch,
            y.data_ptr(),
            normed.data_ptr(),
        )
        abi.check("decode_layer", code)
        return y, normed


def _layer_of(parts: LayerParts) -> abi.Layer:
    norms = [
        abi.Norm(weight=weight.data_ptr(), dim=len(weight), w_type=TYPES[weight.dtype], once=once,
                 eps=eps, offset=offset)
        for weight, eps, offset, once in parts.norms
    ]
    layer = abi.Layer(
        norms=(abi.Norm * 2)(*norms),
        attention=attention_of(parts.form, parts.q_norm, parts.k_norm),
    )
    layer.projections[:] = [address_of(weight) for weight in parts.projections]
    layer.biases[:] = [pointer(bias) for bias in parts.biases]
    if parts.experts is not None:
        _add_experts(layer, parts.experts)
    return layer


def _add_experts(layer: abi.Layer, part: ExpertsPart) -> None:
    layer.router = router_of(part.form, part.weight, part.bias)
    layer.weights_type = TYPES[part.form.weights_dtype]
    layer.gate_up, layer.down = address_of(part.gate_up), address_of(part.down)
    layer.gate_up_bias, layer.down_bias = pointer(part.gate_up_bias), pointer(part.down_bias)
    layer.gate = gate_of(*part.gate)
