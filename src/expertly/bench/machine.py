"""What this machine has to give: how fast it reads memory and multiplies, and what is free."""

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expertly.bench.doctor import matmul_speed
from expertly.bench.timing import best_time
from expertly.kernels.native_read import read_words

# formats that a model can be run in here, and torch's names for them
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WORKING_SET = 2**30  # bytes: ten times a desktop CPU's cache, more than nearly any server's
_ROUNDS = 6
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured: bytes/s read from memory, FLOP/s of a square product, free bytes, threads."""

    bandwidth: float
    flops: float
    free: float
    threads: int


def measure_machine(dtype: torch.dtype) -> Machine:
    """Measure this machine in a few seconds; a GiB of memory is used and given back.

    dtype: of the matrix product.
    """
    return Machine(
        bandwidth=read_bandwidth(),
        flops=matmul_speed(dtype, "cpu") * 1e9,
        free=free_memory(),
        threads=torch.get_num_threads(),
    )


def better(one: Machine, other: Machine) -> Machine:
    """Of two measurements the best figures: a machine that does something else, too, is slower."""
    bandwidth = max(one.bandwidth, other.bandwidth)
    return replace(one, bandwidth=bandwidth, flops=max(one.flops, other.flops))


def read_bandwidth() -> float:
    """Bytes/s at which this process's threads read memory that is in no cache.

    The best round of several kinds of reading, torch's and that of our kernels where they are
    built: none is slower than the memory for the same reason.
    """
    words = torch.ones(_WORKING_SET // 4)  # every page touched
    square = words.view(-1, 4096)
    halves, bits = square.view(torch.bfloat16), words.view(torch.int32)
    row, half_row = torch.ones(4096), torch.ones(8192, dtype=torch.bfloat16)
    reads: tuple[Callable[[], object], ...] = (
        words.sum,
        bits.amax,
        lambda: torch.mv(square, row),
        lambda: torch.mv(halves, half_row),
        lambda: read(words),
    )
    return _WORKING_SET / min(best_time(read, _ROUNDS) for read in reads)


def read(words: torch.Tensor) -> None:
    """Read all of a tensor, with our kernels' threads where they are built."""
    if read_words(words) is None:
        words.sum()


def resident_memory() -> float:
    """Bytes of this process in memory; where the system does not tell, the most there ever were."""
    status = _PROC / "self/statm"
    if status.is_file():
        return float(status.read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most) if sys.platform == "darwin" else most * 1024.0


def free_memory() -> float:
    """Bytes that this process may still take: what the machine has, and its container allows."""
    table = _numbers(_PROC / "meminfo")
    free = table.get("MemAvailable:", 0.0) * 1024  # in kB
    if not free:  # not Linux
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = (_number(_CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is None or used is None:
        return free
    cached = _numbers(_CGROUP / "memory.stat").get("inactive_file", 0.0)  # goes when asked to
    return max(0.0, min(free, limit - used + cached))


def _number(file: Path) -> float | None:
    """What a file of the kernel says, where it is there and a number."""
    text = file.read_text().strip() if file.is_file() else ""
    return float(text) if text.isdigit() else None


def _numbers(file: Path) -> dict[str, float]:
    """A file of lines `name number ...`."""
    lines = file.read_text().splitlines() if file.is_file() else []
    words = [line.split() for line in lines]
    return {word[0]: float(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}
