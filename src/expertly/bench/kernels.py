"""The packed kernels on this machine: for which instruction set, how fast, and what is lost."""

import torch

from expertly.bench.timing import best_time
from expertly.kernels.native import ISAS, library
from expertly.kernels.native_read import read_words
from expertly.kernels.packed import empty_packed
from expertly.kernels.packed_linear import packed_linear

_NAMES = {"portable": "portable C++", "avx2": "AVX2", "avx512": "AVX-512 VNNI"}
_SIZE, _TOKENS = 2048, 256  # of a product that is compute-bound and takes milliseconds
_READ = 2**28  # bytes: more than a desktop CPU's cache; a large server's may hold a part
_ROUNDS = 6


def instruction_set() -> str | None:
    """One of native.ISAS; None where the kernels are not built."""
    loaded = library()
    return None if loaded is None else ISAS[loaded.isa]


def kernels_name(isa: str | None) -> str:
    """For people."""
    return "not built" if isa is None else _NAMES[isa]


@torch.inference_mode()
def packed_speed() -> float:
    """GOP/s of a product with weights of 4 bits, of all threads."""
    weight, x = empty_packed((_SIZE, _SIZE), 4, 32), torch.ones(_TOKENS, _SIZE)
    seconds = best_time(lambda: packed_linear(x, weight), _ROUNDS)
    return 2.0 * _TOKENS * _SIZE**2 / seconds / 1e9


def read_speed() -> float | None:
    """GB/s at which the kernels' threads read memory; None where they are not built."""
    if library() is None:
        return None
    words = torch.ones(_READ // 8, dtype=torch.int64)
    return words.nbytes / best_time(lambda: read_words(words), _ROUNDS) / 1e9


def kernel_findings(isa: str | None) -> list[str]:
    """What is lost, and what to do."""
    if isa is None:
        lost = "models opened with bits= compute with torch, many times slower"
        fix = "install a C++ compiler, then pip install --force-reinstall --no-deps from source"
        return [f"the compiled kernels are not built, or for another version, so {lost}: {fix}"]
    if isa == "portable":
        lost = "models opened with bits= are several times slower than they could be"
        return [f"only portable kernels run here, so {lost}: use a CPU with AVX2 or AVX-512 VNNI"]
    return []
