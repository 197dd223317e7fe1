"""Programs of the kernels' C++ under sanitizers; a source that several need is compiled once."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMPILER = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
KERNELS = Path(__file__).parents[2] / "src/expertly/kernels/cpu"
# checks as calls, not inline: as many of them, and compiled in half of the time
CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", *CALLS)
THREAD = ("-fsanitize=thread",)
FLAGS = ("-std=c++17", "-O1", "-g1", "-fopenmp", "-w")
OPENMP = ("-fopenmp",)


def run(*command: object, **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


class Sanitized:
    """Compiles into a folder; skips the test where there is no compiler or no such sanitizer."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._objects: dict[tuple, Path] = {}

    def program(
        self, sources: Sequence[Path], sanitize: tuple = ADDRESS, linked: tuple = OPENMP
    ) -> Path:
        """The program of these sources, named after the last."""
        self._require(sanitize)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: self._object(source, sanitize), sources))
        program = self._folder / f"{sources[-1].stem}{sanitize[0]}"
        run(COMPILER, *sanitize, *linked, "-pthread", *objects, "-o", program)
        return program

    def _object(self, source: Path, sanitize: tuple) -> Path:
        if (source, sanitize) not in self._objects:
            file = self._folder / f"{source.stem}{sanitize[0]}.o"
            run(COMPILER, *FLAGS, *sanitize, "-c", source, "-o", file)
            self._objects[source, sanitize] = file
        return self._objects[source, sanitize]

    def _require(self, sanitize: tuple) -> None:
        if COMPILER is None:
            pytest.skip("no C++ compiler")
        source, program = self._folder / "empty.cpp", self._folder / "empty"
        source.write_text("int main() {}\n")
        command = [COMPILER, *FLAGS, *sanitize, source, "-o", program]
        if subprocess.run(command).returncode or subprocess.run([program]).returncode:
            pytest.skip("no such sanitizer")
