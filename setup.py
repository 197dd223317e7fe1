"""Builds the CPU kernels with the package; what else there is to say stands in pyproject.toml.

They are a plain shared library that kernels/native.py opens with ctypes. Without a compiler the
package installs all the same and computes with torch.
"""

import os
import tempfile
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOM = "src/expertly/kernels/cpu"
# torch has loaded an OpenMP runtime, which serves; so -fopenmp is for the compiler alone
OPENMP = (["-fopenmp"], ["-Xclang", "-fopenmp"])
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
# of vectors wider than the machine has, and of what gcc says about its own headers
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class BuildKernels(build_ext):
    """A library without Python's name and without a Python module inside."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        ext.extra_compile_args = FLAGS + QUIET + self._openmp()
        super().build_extension(ext)

    def _openmp(self) -> list[str]:
        """What turns OpenMP on in this compiler; nothing where it has none."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "try.cpp")
            with open(source, "w") as file:
                file.write("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            for flags in OPENMP:
                try:
                    self.compiler.compile([source], output_dir=folder, extra_postargs=flags)
                    return flags
                except CompileError:
                    continue
        return []


setup(
    ext_modules=[
        Extension(
            "expertly.kernels._cpu",
            sources=sorted(glob(f"{ROOM}/*.cpp")),
            depends=sorted(glob(f"{ROOM}/*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
