"""The C side of kernels/cpu/: structs, argument types and codes of its headers; the library."""

import ctypes
import struct
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

ABI = 2  # EXPERTLY_ABI of expertly.h
_OPENMP = ("libgomp.so.1", "libomp.so", "libomp.so.5", "libomp.dylib")
_NO_MEMORY = -14
WRONG = {
    -1: "a tensor is missing",
    -2: "this machine lacks the instruction set asked for",
    -3: "at least one thread is needed, and no more than 4096",
    -4: "weights have 4, 8 or 16 bits",
    -5: "groups have 32, 64 or 128 weights, and 16 bits have none",
    -6: "the input width does not divide into groups",
    -7: "zero points do not fit their kind",
    -8: "a size is zero, negative or not a multiple of 16",
    -9: "the sizes overflow",
    -10: "float32 or bfloat16 is needed",
    -11: "counts are negative or do not add up to the rows",
    -12: "the gate is unknown",
    -13: "the weights do not fit one another",
    _NO_MEMORY: "no memory",
    -15: "a tensor's address is not a multiple of its item size",
    -20: "heads must be a multiple of 32 wide and divide into those of the cache",
    -21: "the cache has no room for another token",
    -22: "the rotary embedding does not fit the heads",
    -23: "the norm of queries and keys is unknown",
    -24: "more experts are chosen than there are",
    -25: "experts do not divide into the groups",
    -26: "the score is unknown",
}


class Weight(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("bits", c_int32),
        ("group", c_int32),
        ("zero_kind", c_int32),
        ("experts", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("out", c_int64),
    )


class Gate(ctypes.Structure):
    _fields_ = (("act", c_int32), ("gated", c_int32), ("alpha", c_float), ("limit", c_float))


class Norm(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("dim", c_int64),
        ("x_type", c_int32),
        ("w_type", c_int32),
        ("y_type", c_int32),
        ("once", c_int32),
        ("eps", c_float),
        ("offset", c_float),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("clip", c_float),
        ("norm", c_int32),
        ("norm_type", c_int32),
        ("eps", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class Router(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_type", c_int32),
        ("score", c_int32),
        ("experts", c_int64),
        ("dim", c_int64),
        ("top_k", c_int64),
        ("groups", c_int64),
        ("top_groups", c_int64),
        ("renormalise", c_int32),
        ("exact", c_int32),
        ("eps", c_float),
        ("factor", c_float),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("norms", Norm * 2),
        ("projections", c_void_p * 4),
        ("biases", c_void_p * 4),
        ("attention", Attention),
        ("router", Router),
        ("weights_type", c_int32),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("gate", Gate),
    )


_RUN = (c_int, c_int)  # isa, threads
_TYPED = (c_void_p, c_int)  # a tensor and its type
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linears": (*_RUN, c_int, *[c_void_p] * 3, c_int, c_int64, *_TYPED),
    "grouped_linear": (*_RUN, *[c_void_p] * 3, c_int, c_void_p, c_int64, *_TYPED),
    "experts": (*_RUN, *[c_void_p] * 6, c_int, *[c_void_p] * 2, c_int64, c_int64, *_TYPED),
    "rms_norm": (c_int, c_void_p),
    "attend": (*_RUN, *[c_void_p] * 2, c_int, c_int64, c_void_p),
    "route": (*_RUN, c_void_p, *_TYPED, c_int64, *_TYPED, *_TYPED, c_void_p),
    "decode_layers": (*_RUN, c_int64, *[c_void_p] * 3, c_int, c_int64, *[c_void_p] * 2),
    "read": (c_int, c_void_p, c_int64, c_void_p),
}


# made faster than by ctypes; bytes go as their address
norm = struct.Struct("3P2q4i2f").pack  # a Norm
decoding = struct.Struct("5P2q2P2q").pack  # an expertly_decoding


def load(path: Path) -> ctypes.CDLL | None:
    """Open the library; None if that fails, or if it was built from sources with another ABI."""
    handle = _opened(path) if path.exists() else None
    number = getattr(handle, "expertly_abi", None)
    return handle if number is not None and number() == ABI else None


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library, with the OpenMP runtime that torch has loaded."""
    for runtime in (None, *_OPENMP):
        try:
            if runtime is not None:  # this torch keeps its own to itself
                ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


def typed(handle: ctypes.CDLL, name: str) -> Any:
    """One of the library's functions by its name in ARGUMENTS."""
    function = getattr(handle, f"expertly_{name}")
    function.argtypes, function.restype = ARGUMENTS[name], c_int
    return function


def check(name: str, code: int) -> None:
    """Raise ValueError for a function that refused its arguments, MemoryError where it had none."""
    if code:
        error = MemoryError if code == _NO_MEMORY else ValueError
        raise error(f"{name}: {WRONG.get(code, f'error {code}')}")


def addresses(each: list[int]) -> bytes:
    """A C array of pointers; ctypes passes bytes as their address."""
    return struct.pack("P" * len(each), *each)
