"""Decoder layers for one new token per sequence, in one native call.

What stands between two calls from Python, and between two teams of threads, costs more than a small
layer's arithmetic. The C++ is in cpu/layer.cpp, and runs what the single calls of native.py and
native_ops.py run. Forward only, on the CPU, in float32 or bfloat16.
"""

from collections.abc import Sequence
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.kernels import native_abi as abi
from expertly.kernels.native import TYPES, Gate, Library, address_of, check_bias, gate_of, pointer
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


class NativeLayers:
    """Layers' parts, one behind the other, kept together with the structs that point into them."""

    def __init__(self, library: Library, parts: Sequence[LayerParts]):
        self._library, self.parts = library, parts
        self._decode = abi.typed(library.handle, "decode_layers")
        self._layers = (abi.Layer * len(parts))(*map(_layer_of, parts))

    def decode(
        self, x: Tensor, angles: tuple[Tensor, Tensor], rooms: Sequence[Room], length: int
    ) -> tuple[Tensor, Tensor]:
        """x (batch, 1, dim) through the layers: the last one's answer, and its second norm's.

        angles: cosines and sines (batch or 1, 1, rotated); rooms: one for each layer. The token is
        put behind the `length` that are in each. Raises ValueError for tensors that do not fit one
        another.
        """
        cos, sin = angles
        _check(self.parts, x, cos, sin, rooms)
        none = (0, 0, 0)  # the layers' own
        places = b"".join([decoding_of(none, cos, sin, room, length) for room in rooms])
        y, normed = torch.empty_like(x), torch.empty_like(x)
        code = self._decode(
            self._library.isa,
            torch.get_num_threads(),
            len(rooms),
            byref(self._layers),
            places,
            x.data_ptr(),
            TYPES[x.dtype],
            len(x),
            y.data_ptr(),
            normed.data_ptr(),
        )
        abi.check("decode_layers", code)
        return y, normed


def _check(
    parts: Sequence[LayerParts], x: Tensor, cos: Tensor, sin: Tensor, rooms: Sequence[Room]
) -> None:
    """What the native side cannot see; ValueError."""
    dim, sizes = parts[0].projections[0].shape[-1], {(x.shape[0], x.dtype)}
    if x.shape[1:] != (1, dim) or cos.shape != sin.shape or cos.shape[1] != 1:
        raise ValueError(f"layers: x is {tuple(x.shape)}, its angles {tuple(cos.shape)}")
    if any(not each.is_contiguous() or each.dtype is not x.dtype for each in (x, cos, sin)):
        raise ValueError("layers: tensors must be contiguous and of one dtype")
    for part, room in zip(parts, rooms, strict=True):
        heads = part.form.kv_heads, part.form.head_dim
        if heads != (room.kv_heads, room.head_dim) or {(room.batch, room.dtype)} != sizes:
            raise ValueError("layers: the cache does not fit them")


def _layer_of(parts: LayerParts) -> abi.Layer:
    for projection, bias in zip(parts.projections, parts.biases, strict=True):
        check_bias(bias, projection.shape[:-1])
    if any(not norm.weight.is_contiguous() for norm in parts.norms):
        raise ValueError("layers: the norms' weights must be contiguous")
    norms = [
        abi.Norm(
            weight=weight.data_ptr(),
            dim=len(weight),
            w_type=TYPES[weight.dtype],
            once=once,
            eps=eps,
            offset=offset,
        )
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
    check_bias(part.bias, part.weight.shape[:1])
    check_bias(part.gate_up_bias, part.gate_up.shape[:-1])
    check_bias(part.down_bias, part.down.shape[:-1])
    if not part.weight.is_contiguous():
        raise ValueError("layers: the router's weight must be contiguous")
    layer.router = router_of(part.form, part.weight, part.bias)
    layer.weights_type = TYPES[part.form.weights_dtype]
    layer.gate_up, layer.down = address_of(part.gate_up), address_of(part.down)
    layer.gate_up_bias, layer.down_bias = pointer(part.gate_up_bias), pointer(part.down_bias)
    layer.gate = gate_of(*part.gate)
