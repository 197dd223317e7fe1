"""Out of memory: how to tell, whatever library ran into it. torch has a class for GPUs only."""

import ctypes
import errno
import re
import resource
import sys

from expertly.errors import ExpertlyError

_SAID = re.compile(
    r"not enough memory|(can't|cannot|unable to) allocate|out of memory|std::bad_alloc"
    r"|failed to map segment"  # by a library that is being imported
    r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED",
    re.I,
)
_UNITS = {"": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | ImportError) and bool(_SAID.search(str(error)))


def asked_bytes(error: BaseException) -> int | None:
    """The size of the allocation that failed, where the error tells."""
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)?", str(error), re.I)
    return round(float(found[1]) * _UNITS[found[2] or ""]) if found else None


def memory_error(what: str, error: BaseException, *, fix: str, in_use: int = 0) -> ExpertlyError:
    """The E402 for a failed allocation. in_use: bytes that were in use then; 0: not known."""
    asked = asked_bytes(error)
    why = "out of memory" if asked is None else f"out of memory: need {size(asked)} more"
    if in_use:
        why += f", {size(in_use)} in use"
    return ExpertlyError("E402", what, why, fix=fix)


def peak_memory() -> int:
    """The most memory that this process has had at once, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Hand freed memory back to the system; glibc keeps it for later, in ever larger holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another C library gives it back by itself
        trim(0)


def size(count: float) -> str:
    """A number of bytes for people: 96 MB, 1.5 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"
