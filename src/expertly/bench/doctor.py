"""Look at a machine as a doctor would: what it has, what it can do, what is slow and why."""

import os
from dataclasses import dataclass

import torch

from expertly.bench.kernels import (
    instruction_set,
    kernel_findings,
    kernels_name,
    packed_speed,
    read_speed,
)
from expertly.bench.timing import best_time
from expertly.receipts import versions

_SIZE = 1024  # a square matrix of this many rows is compute-bound and takes milliseconds
_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found; speeds in GFLOP/s of a square matrix product.

    kernels: the instruction set of the packed kernels; packed_speed: GOP/s of a product with 4-bit
    weights, with torch's operations where they are not built; read_speed: GB/s from memory.
    """

    versions: dict[str, str]
    device: str
    threads: int
    cores: int
    speeds: dict[str, float]
    kernels: str
    packed_speed: float
    read_speed: float | None
    findings: tuple[str, ...]


def examine() -> Examination:
    """Measure matrix products in float32, bfloat16 and with packed weights, a second in all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    speeds = {
        "float32": matmul_speed(torch.float32, device),
        "bfloat16": matmul_speed(torch.bfloat16, device),
    }
    if device == "cpu":
        speeds["one thread"] = _single_thread_speed()
    threads, cores, isa = torch.get_num_threads(), _cores(), instruction_set()
    return Examination(
        versions=versions("torch", "transformers", "safetensors", "tokenizers", "datasets"),
        device=f"{device} ({name})",
        threads=threads,
        cores=cores,
        speeds=speeds,
        kernels=kernels_name(isa),
        packed_speed=packed_speed(),
        read_speed=read_speed(),
        findings=(*findings(device, threads, cores, speeds), *kernel_findings(isa)),
    )


def findings(device: str, threads: int, cores: int, speeds: dict[str, float]) -> list[str]:
    """What is slow here and why, a line each with what to do."""
    found = []
    if device == "cpu":
        found.append("no GPU: training is limited by the CPU; keep models small")
    if speeds["bfloat16"] < speeds["float32"]:
        ratio = speeds["float32"] / speeds["bfloat16"]
        found.append(f"bfloat16 is {ratio:.1f}x slower than float32 here: leave schedule.bf16 off")
    if device == "cuda" and speeds["bfloat16"] > 2 * speeds["float32"]:
        ratio = speeds["bfloat16"] / speeds["float32"]
        found.append(f"bfloat16 is {ratio:.1f}x faster than float32 here: set schedule.bf16=true")
    if threads > 1 and speeds["float32"] < 1.4 * speeds.get("one thread", 0.0):
        ratio = speeds["float32"] / speeds["one thread"]
        found.append(f"{threads} threads are {ratio:.1f}x one: they share a core, or the machine")
    if threads < cores:
        found.append(f"{threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    if threads > cores:
        found.append(f"{threads} threads share {cores} cores: set OMP_NUM_THREADS={cores}")
    return found


def _single_thread_speed() -> float:
    """GFLOP/s in float32 of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return matmul_speed(torch.float32, "cpu")
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    """How many this process may use, which in a container is fewer than there are."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def matmul_speed(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a square product, the best of several."""
    a, b = (torch.randn(_SIZE, _SIZE).to(device, dtype) for _ in range(2))
    # reading a value waits for the device
    return 2 * _SIZE**3 / best_time(lambda: float((a @ b)[0, 0]), _ROUNDS) / 1e9
