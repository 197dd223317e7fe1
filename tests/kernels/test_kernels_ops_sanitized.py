"""Attention and router in C++ under AddressSanitizer and UndefinedBehaviorSanitizer."""

from pathlib import Path

from sanitized import KERNELS, run

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


def test_no_byte_is_read_or_written_that_the_caller_did_not_give(sanitized, tmp_path):
    isa, here = tmp_path / "isa.cpp", Path(__file__).with_suffix(".cpp")
    isa.write_text(ISA)
    driver = sanitized.program([*KERNELS.glob("ops_*.cpp"), KERNELS / "team.cpp", isa, here])
    assert "100 rounds" in run(driver, "100", OMP_NUM_THREADS="2")
