"""What the doctor says of the packed kernels, with and without them."""

import json

import pytest

from expertly.bench import doctor, kernels
from expertly.bench.kernels import instruction_set, kernel_findings, packed_speed, read_speed
from expertly.kernels import native_read, packed_linear
from expertly.kernels.native import ISAS, library


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(doctor, "_SIZE", 64)
    monkeypatch.setattr(kernels, "_READ", 2**16)
    monkeypatch.setattr(kernels, "_SIZE", 64)


@pytest.fixture
def unbuilt(monkeypatch):
    """As where there was no compiler."""
    for module in (kernels, native_read, packed_linear):
        monkeypatch.setattr(module, "library", lambda: None)


needs_library = pytest.mark.skipif(library() is None, reason="the kernels are not built")


@needs_library
def test_the_doctor_names_the_kernels_and_their_speed(cli):
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    assert any(name in out for name in kernels._NAMES.values())
    assert "GOP/s" in out and "GB/s" in out and "not built" not in out
    assert instruction_set() in ISAS
    assert packed_speed() > 0 and read_speed() > 0


def test_without_the_kernels_the_doctor_says_what_is_lost(cli, unbuilt):
    code, out, _ = cli("doctor")
    assert code == 0
    lines = out.splitlines()
    assert any(line.split() == ["kernels", "not", "built"] for line in lines)
    assert "GOP/s" in out and "GB/s" not in out
    (lost,) = (line for line in lines if line.startswith("! ") and "not built" in line)
    assert "bits=" in lost and "slower" in lost and "another version" in lost
    assert "C++ compiler" in lost and "pip install --force-reinstall --no-deps" in lost
    said = json.loads(cli("doctor", "--json")[1])
    assert (said["kernels"], said["read_speed"]) == ("not built", None)
    assert said["packed_speed"] > 0


@pytest.mark.parametrize(
    ("isa", "said"),
    [(None, "not built"), ("portable", "only portable"), ("avx2", ""), ("avx512", "")],
)
def test_a_finding_for_kernels_that_are_slow_or_missing(isa, said):
    found = kernel_findings(isa)
    assert len(found) == bool(said)
    assert all(said in line and ": " in line for line in found)


def test_every_instruction_set_has_a_name():
    assert kernels._NAMES.keys() == set(ISAS)
    assert kernels.kernels_name("avx512") == "AVX-512 VNNI"
