"""The C++ of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, random sizes."""

from pathlib import Path

from sanitized import KERNELS, run

SOURCES = ("api", "avx2", "avx512", "check", "portable", "team")


def test_no_byte_is_read_or_written_that_the_caller_did_not_give(sanitized):
    sources = [KERNELS / f"{name}.cpp" for name in SOURCES]
    driver = sanitized.program([*sources, Path(__file__).with_suffix(".cpp")])
    assert "150 rounds" in run(driver, "150", OMP_NUM_THREADS="2")
