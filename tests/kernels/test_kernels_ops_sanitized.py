"""Attention and router in C++ under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
from pathlib import Path

import pytest
from test_kernels_cpu_sanitized import COMPILER, FLAGS, KERNELS, run


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "isa.cpp").write_text(ISA)
    try:
        subprocess.run(
            [COMPILER, *FLAGS, folder / "isa.cpp", "-c", "-o", folder / "isa.o"], check=True
        )
        subprocess.run(
            [COMPILER, *FLAGS, "-shared", folder / "isa.o", "-o", folder / "a"], check=True
        )
    except subprocess.CalledProcessError:
        pytest.skip("no sanitizers")
    sources = [*KERNELS.glob("ops_*.cpp"), KERNELS / "team.cpp", Path(__file__).with_suffix(".cpp")]
    run(COMPILER, *FLAGS, *sources, folder / "isa.o", "-o", folder / "driver")
    return folder / "driver"


# of api.cpp, which needs all of the packed kernels
ISA = """extern "C" int expertly_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2 ? 1 + !!__builtin_cpu_supports("avx512vl") : 0;
#else
  return 0;
#endif
}
"""


def test_no_byte_is_read_or_written_that_the_caller_did_not_give(driver):
    assert "100 rounds" in run(driver, "100", OMP_NUM_THREADS="2")
