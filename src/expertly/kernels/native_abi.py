"""The C side of kernels/cpu/expertly.h: its structs, argument types, codes and shared library."""

import ctypes
import struct
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

_OPENMP = ("libgomp.so.1", "libomp.so", "libomp.so.5", "libomp.dylib")
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
    -14: "no memory",
    -15: "a tensor's address is not a multiple of its item size",
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


# after isa, and threads where there are any
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linears": (c_int, *[c_void_p] * 3, c_int, c_int64, c_void_p, c_int),
    "grouped_linear": (*[c_void_p] * 3, c_int, c_void_p, c_int64, c_void_p, c_int),
    "experts": (*[c_void_p] * 6, c_int, *[c_void_p] * 2, c_int64, c_int64, c_void_p, c_int),
    "rms_norm": (c_void_p,),
}


norm = struct.Struct("3P2q4i2f").pack  # expertly_norm; bytes go as their address


def load(path: Path) -> ctypes.CDLL | None:
    """Open the library, None if that fails; the OpenMP runtime is the one that torch has loaded."""
    if not path.exists():
        return None
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
    first = (c_int,) if name == "rms_norm" else (c_int, c_int)
    function.argtypes, function.restype = (*first, *ARGUMENTS[name]), c_int
    return function


def addresses(each: list[int]) -> bytes:
    """A C array of pointers; ctypes passes bytes as their address."""
    return struct.pack("P" * len(each), *each)
