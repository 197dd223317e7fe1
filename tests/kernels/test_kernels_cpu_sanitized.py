"""The C++ of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, random sizes."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMPILER = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
KERNELS = Path(__file__).parents[2] / "src/expertly/kernels/cpu"
SOURCES = ("api", "avx2", "avx512", "check", "portable", "team")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-w", *SANITIZE]


def run(*command, **env):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([COMPILER, *FLAGS, folder / "empty.cpp", "-o", folder / "empty"]).returncode:
        pytest.skip("no sanitizers")
    sources = [*(KERNELS / f"{name}.cpp" for name in SOURCES), Path(__file__).with_suffix(".cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        compiled = [
            pool.submit(run, COMPILER, *FLAGS, "-c", source, "-o", object)
            for source, object in zip(sources, objects, strict=True)
        ]
    for each in compiled:
        each.result()
    run(COMPILER, *FLAGS, *objects, "-o", folder / "driver")
    return folder / "driver"


def test_no_byte_is_read_or_written_that_the_caller_did_not_give(driver):
    assert "150 rounds" in run(driver, "150", OMP_NUM_THREADS="2")
