"""Decoder layers in C++ under AddressSanitizer and UndefinedBehaviorSanitizer, and their threads
under ThreadSanitizer."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_kernels_cpu_sanitized import COMPILER, FLAGS, KERNELS, SANITIZE, run

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
PLAIN = [flag for flag in FLAGS if flag not in SANITIZE]
# the driver's own threads stand in for OpenMP's there, so it is compiled for but not linked
WAYS = {"address": (SANITIZE, ["-fopenmp"]), "thread": (["-fsanitize=thread"], [])}


@pytest.fixture(scope="module", params=WAYS)
def driver(request, tmp_path_factory):
    sanitize, linked = WAYS[request.param]
    if COMPILER is None or (request.param == "thread" and not _is_gcc()):
        pytest.skip("no compiler for it")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}\n")
    empty = [COMPILER, *PLAIN, *sanitize, folder / "empty.cpp", "-o", folder / "empty"]
    if subprocess.run(empty).returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip("no sanitizer")
    sources = [*(KERNELS / f"{name}.cpp" for name in SOURCES), Path(__file__).with_suffix(".cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        compiled = [
            pool.submit(
                run, COMPILER, *PLAIN, *sanitize, *_less(source), "-c", source, "-o", object
            )
            for source, object in zip(sources, objects, strict=True)
        ]
    for each in compiled:
        each.result()
    run(COMPILER, *sanitize, *linked, "-pthread", *objects, "-o", folder / "driver")
    return folder / "driver"


def _less(source):
    """Half of the time goes into what the packed kernels' own driver has seen."""
    return ["-fno-sanitize=undefined"] if source.stem == "portable" else []


def _is_gcc():
    """Whether OpenMP's calls are those that the driver answers."""
    macros = run(COMPILER, "-dM", "-E", "-x", "c++", "/dev/null")
    return "__clang__" not in macros and "__GNUC__" in macros


def test_no_byte_and_no_thread_is_where_it_must_not_be(driver):
    assert "16 rounds" in run(driver, "16", OMP_NUM_THREADS="2")
