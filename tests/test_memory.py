"""Out of memory, as it is said by everything that can run into it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expertly.memory import (
    asked_bytes,
    give_back,
    is_out_of_memory,
    memory_error,
    peak_memory,
    size,
)

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.8 GiB of "
    "which 1.2 GiB is free."
)
SAID = [
    (RuntimeError(CPU), 4398046511104),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."), 12),
    (torch.OutOfMemoryError(GPU), int(2.5 * 2**30)),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 20 * 2**20),
    (MemoryError(), None),
    (MemoryError("Unable to allocate 3.00 TiB for an array"), None),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), None),
    (RuntimeError("unable to mmap 99 bytes from file <a>: Cannot allocate memory (12)"), None),
    (RuntimeError("std::bad_alloc"), None),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), None),
]


@pytest.mark.parametrize(("error", "asked"), SAID, ids=lambda each: str(each)[:30])
def test_told_apart_and_measured(error, asked):
    assert is_out_of_memory(error)
    assert asked_bytes(error) == asked


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "disk"),
        ImportError("no module named memory"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_left_alone(error):
    assert not is_out_of_memory(error)


def test_what_torch_really_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert asked_bytes(caught.value) == 2**50


def test_e402_says_what_was_asked_and_what_was_in_use():
    error = memory_error("training", RuntimeError(CPU), fix="do less", in_use=3 * 10**9)
    assert (error.code, error.exit_code) == ("E402", 4)
    assert str(error) == (
        "error[E402] training: out of memory: need 4.4 TB more, 3 GB in use. FIX: do less"
    )
    said = str(memory_error("this machine", MemoryError(), fix="do less"))
    assert said == "error[E402] this machine: out of memory. FIX: do less"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (96_000_000, "96 MB"),
        (1.5e9, "1.5 GB"),
        (2.25e12, "2.25 TB"),
    ],
)
def test_sizes_for_people(count, said):
    assert size(count) == said


@pytest.mark.parametrize("room", [60, 300])
def test_the_door_says_e402_for_any_verb(room, tmp_path):
    """A real limit, on address space in MiB: already the imports do not fit."""
    code = "import resource, sys\nfrom expertly.__main__ import main\n"
    code += f"resource.setrlimit(resource.RLIMIT_AS, ({room} * 2**20,) * 2)\n"
    code += f"sys.argv = ['expertly', 'generate', {str(tmp_path)!r}]\nmain()\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 4, done.stderr
    line = "expertly: error[E402] this machine: out of memory. FIX: close other programs, "
    assert done.stderr.splitlines()[-1].startswith(line), done.stderr


# --- How much there is in use ------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory, as Linux tells them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_peak_is_what_was_in_use_at_once():
    more = 64 * 2**20
    wanted = resident() + more
    held = torch.ones(more // 4)
    assert peak_memory() >= 0.9 * wanted
    del held
    assert peak_memory() >= 0.9 * wanted, "a peak does not go down"
    assert peak_memory() < 2**40, "bytes"


def test_memory_is_given_back_and_nothing_in_use_is_lost():
    kept = torch.arange(1000)
    blocks = [torch.ones(2**14) for _ in range(800)]  # 64 kB each, that glibc keeps
    pins = blocks[::100]
    full = resident()
    del blocks
    give_back()
    assert resident() < full - 20 * 2**20
    assert torch.equal(kept, torch.arange(1000))
    assert all(bool((pin == 1).all()) for pin in pins)


def test_giving_back_is_left_out_where_the_c_library_has_no_such_call(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    give_back()
