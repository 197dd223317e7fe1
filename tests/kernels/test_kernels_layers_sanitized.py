"""Decoder layers in C++ under AddressSanitizer and UndefinedBehaviorSanitizer, and their threads
under ThreadSanitizer."""

from pathlib import Path

import pytest
from sanitized import ADDRESS, COMPILER, KERNELS, OPENMP, THREAD, run

SOURCES = (
    "api",
    "check",
    "layer",
    "ops_attention",
    "ops_portable",
    "ops_route",
    "portable",
    "team",
)
# the driver's own threads stand in for OpenMP's there, so it is compiled for but not linked
WAYS = {"address": (ADDRESS, OPENMP), "thread": (THREAD, ())}


def _is_gcc():
    """Whether OpenMP's calls are those that the driver answers."""
    macros = run(COMPILER, "-dM", "-E", "-x", "c++", "/dev/null")
    return "__clang__" not in macros and "__GNUC__" in macros


@pytest.mark.parametrize("way", WAYS)
def test_no_byte_and_no_thread_is_where_it_must_not_be(way, sanitized):
    if way == "thread" and COMPILER and not _is_gcc():
        pytest.skip("another OpenMP than the driver stands in for")
    sources = [KERNELS / f"{name}.cpp" for name in SOURCES]
    driver = sanitized.program([*sources, Path(__file__).with_suffix(".cpp")], *WAYS[way])
    assert "16 rounds" in run(driver, "16", OMP_NUM_THREADS="2")
