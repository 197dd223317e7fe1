"""The compiled kernels of cpu/, called with tensors: no torch headers, no glue, only addresses.

Inference only: nothing here records gradients. The library is built with the package where there
is a compiler; without it library() is None and torch's own operations take over.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from ctypes import byref
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.kernels import native_abi as abi
from expertly.kernels.packed import PackedWeight

ISAS = ("portable", "avx2", "avx512")  # by expertly_best_isa's number
_ACTS = ("silu", "gelu", "gelu_tanh", "clamped", "relu", "relu2")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ZERO_KINDS = {None: 0, torch.uint8: 1, torch.float16: 2}


class Gate(NamedTuple):
    """What an expert computes between its projections."""

    act: str  # silu, gelu, gelu_tanh, clamped (gpt-oss's SwiGLU), relu or relu2
    gated: bool = True  # act(gate) * up; else act(up)
    alpha: float = 1.702  # of "clamped", and
    limit: float = 7.0  # where it clamps


class Library:
    """The kernels for one instruction set; every function checks its bounds and raises ValueError.

    Activations are float32 or bfloat16, and so are the results. For weights of 4 and 8 bits they
    are rounded to int8 in groups of 32; for 16 bits all sums are in float32.
    """

    def __init__(self, handle: ctypes.CDLL, isa: int):
        self.handle, self.isa = handle, isa
        self._linears = abi.typed(handle, "linears")
        self._grouped = abi.typed(handle, "grouped_linear")
        self._experts = abi.typed(handle, "experts")
        self._norm = abi.typed(handle, "rms_norm")

    def linears(
        self, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], x: Tensor
    ) -> list[Tensor]:
        """x (.., in) through weights (out, in) that share it: one (.., out) each.

        biases: (out,) float32 or None.
        """
        x = x.contiguous()
        *lead, width = x.shape
        kind, count = type_of(x), len(weights)
        outs = []
        for weight, bias in zip(weights, biases, strict=True):
            out, cols = weight.shape
            if cols != width:
                raise _misfit(x, weight)
            if bias is not None:
                check_bias(bias, (out,))
            outs.append(x.new_empty(*lead, out))
        code = self._linears(
            self.isa,
            torch.get_num_threads(),
            count,
            abi.addresses([address_of(weight) for weight in weights]),
            abi.addresses([0 if bias is None else bias.data_ptr() for bias in biases]),
            x.data_ptr(),
            kind,
            math.prod(lead),
            abi.addresses([out.data_ptr() for out in outs]),
            kind,
        )
        abi.check("linears", code)
        return outs

    def grouped_linear(
        self, weight: PackedWeight, bias: Tensor | None, x: Tensor, counts: Tensor
    ) -> Tensor:
        """Rows of x (rows, in), sorted by expert, through a stack (experts, out, in): (rows, out).

        bias: (experts, out) float32 or None; counts: (experts,) int64.
        """
        x, counts, kind = x.contiguous(), counts.contiguous(), type_of(x)
        _check_rows(x, weight)
        check_bias(bias, weight.shape[:-1])
        _check_integers("counts", counts, (weight.experts,))
        out = x.new_empty(len(x), weight.shape[-2])
        code = self._grouped(
            self.isa,
            torch.get_num_threads(),
            address_of(weight),
            pointer(bias),
            x.data_ptr(),
            kind,
            counts.data_ptr(),
            len(x),
            out.data_ptr(),
            kind,
        )
        abi.check("grouped_linear", code)
        return out

    def experts(
        self,
        gate_up: PackedWeight,
        down: PackedWeight,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        gate: Gate,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """A whole experts layer on x (tokens, dim): projections, gate and weighted sum.

        ids: (tokens, top_k) int64, weights: (tokens, top_k); ids outside the experts and weights
        of 0 are skipped. Biases are (experts, rows) float32 or None.
        """
        x, ids, kind = x.contiguous(), ids.contiguous(), type_of(x)
        weights, (tokens, top_k) = weights.float().contiguous(), weights.shape
        _check_rows(x, gate_up)
        check_bias(gate_up_bias, gate_up.shape[:-1])
        check_bias(down_bias, down.shape[:-1])
        _check_integers("ids", ids, (tokens, top_k))
        if len(x) != tokens or not weights.is_cpu:
            raise ValueError(f"experts: {tokens} tokens' weights for {len(x)} tokens on the CPU")
        out = x.new_empty(tokens, down.shape[-2])
        code = self._experts(
            self.isa,
            torch.get_num_threads(),
            address_of(gate_up),
            address_of(down),
            pointer(gate_up_bias),
            pointer(down_bias),
            byref(gate_of(*gate)),
            x.data_ptr(),
            kind,
            ids.data_ptr(),
            weights.data_ptr(),
            tokens,
            top_k,
            out.data_ptr(),
            kind,
        )
        abi.check("experts", code)
        return out

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, once: bool = False
    ) -> Tensor:
        """x / rms(x) * (weight + offset) over the last axis; the wider dtype of the two.

        x / rms(x) is rounded to x's dtype first, as Llama's is. once: it is not, and the result
        has x's dtype, as Gemma's. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
        """
        x, weight = x.contiguous(), weight.contiguous()
        (dim,) = weight.shape
        if x.shape[-1] != dim:
            raise ValueError(f"rms_norm: x is {tuple(x.shape)}, its weight ({dim},)")
        x_kind, weight_kind = type_of(x), type_of(weight)
        wide = once or x_kind <= weight_kind  # 0 is float32, the wider one
        out = torch.empty_like(x) if wide else torch.empty_like(x, dtype=weight.dtype)
        kinds = x_kind, weight_kind, x_kind if wide else weight_kind
        places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        rows = x.numel() // max(dim, 1)  # no width is refused on the other side
        code = self._norm(self.isa, abi.norm(*places, rows, dim, *kinds, once, eps, offset))
        abi.check("rms_norm", code)
        return out


@functools.cache
def library() -> Library | None:
    """The kernels for this machine's best instruction set; None without the compiled file."""
    handle = abi.load(Path(__file__).with_name("_cpu.so"))
    return None if handle is None else Library(handle, handle.expertly_best_isa())


class _Native(NamedTuple):
    """A packed weight as the kernels take it."""

    struct: abi.Weight
    address: int
    places: tuple[int, int | None, int | None]  # of its tensors; reading the struct takes longer


def address_of(weight: PackedWeight) -> int:
    """Where the weight's struct lies: made once, kept beside the tensors, true wherever they go."""
    kept = weight.__dict__.get("_native")
    if kept is None:  # of two threads' the first one counts
        kept = weight.__dict__.setdefault("_native", _native_of(weight))
    places = weight.data.data_ptr(), pointer(weight.scales), pointer(weight.zeros)
    if places != kept.places:  # sharing memory moves tensors; others may hold the address
        struct = kept.struct
        struct.data, struct.scales, struct.zeros = places
        weight.__dict__["_native"] = kept._replace(places=places)
    return kept.address


def _native_of(weight: PackedWeight) -> _Native:
    zeros, (out, cols) = weight.zeros, weight.shape[-2:]
    places = weight.data.data_ptr(), pointer(weight.scales), pointer(zeros)
    made = abi.Weight(
        *places,
        weight.bits,
        weight.group_size,
        _ZERO_KINDS[None if zeros is None else zeros.dtype],
        weight.experts,
        out + -out % 16,
        cols,
        out,
    )
    return _Native(made, ctypes.addressof(made), places)


@functools.cache
def gate_of(act: str, gated: bool, alpha: float, limit: float) -> abi.Gate:
    return abi.Gate(_ACTS.index(act), gated, alpha, limit)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def type_of(x: Tensor) -> int:
    """A tensor's dtype in C. Raises ValueError for one that the kernels cannot read."""
    if not x.is_cpu:
        raise ValueError(f"native kernels run on the CPU, not on {x.device}")
    try:
        return TYPES[x.dtype]
    except KeyError:
        raise ValueError(f"native kernels read float32 and bfloat16, not {x.dtype}") from None


def _check_rows(x: Tensor, weight: PackedWeight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.shape[-1]:
        raise _misfit(x, weight)


def _misfit(x: Tensor, weight: PackedWeight) -> ValueError:
    return ValueError(f"x is {tuple(x.shape)}, the packed weight {weight.shape}")


def check_bias(bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is None:
        return
    right = bias.shape == shape and bias.dtype == torch.float32 and bias.is_cpu
    if not right or not bias.is_contiguous():
        found = f"{tuple(bias.shape)} {bias.dtype} on {bias.device}"
        raise ValueError(
            f"a bias must be contiguous float32 {tuple(shape)} on the CPU, not {found}"
        )


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != torch.int64 or not tensor.is_cpu:
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {shape} int64 on the CPU, not {found}")
