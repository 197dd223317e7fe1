"""What the doctor says of a machine."""

import pytest
import torch

from expertly.bench import doctor, kernels
from expertly.bench.doctor import examine, findings, matmul_speed


@pytest.mark.parametrize(
    ("device", "threads", "cores", "float32", "bfloat16", "said"),
    [
        pytest.param("cuda", 8, 8, 100, 150, [], id="nothing"),
        pytest.param("cpu", 8, 8, 100, 100, ["no GPU"], id="no GPU"),
        pytest.param("cuda", 8, 8, 100, 25, ["4.0x slower"], id="slow bfloat16"),
        pytest.param("cuda", 8, 8, 100, 900, ["9.0x faster"], id="fast bfloat16"),
        pytest.param("cpu", 8, 8, 100, 900, ["no GPU"], id="fast bfloat16 on a CPU"),
        pytest.param("cuda", 2, 8, 100, 150, ["OMP_NUM_THREADS=8"], id="idle cores"),
        pytest.param("cuda", 8, 2, 100, 150, ["OMP_NUM_THREADS=2"], id="crowded cores"),
        pytest.param("cpu", 1, 2, 8, 4, ["no GPU", "2.0x slower", "=2"], id="all at once"),
    ],
)
def test_findings_say_what_is_slow_and_what_to_do(device, threads, cores, float32, bfloat16, said):
    found = findings(device, threads, cores, {"float32": float32, "bfloat16": bfloat16})
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))
    assert all(": " in line for line in found), "a finding without advice"


def test_threads_that_share_a_core_are_found():
    speeds = {"float32": 120, "bfloat16": 130, "one thread": 100}
    assert "2 threads are 1.2x one" in findings("cpu", 2, 2, speeds)[-1]
    assert not any("threads" in line for line in findings("cpu", 1, 1, speeds))


def test_an_examination_measures_this_machine(monkeypatch):
    monkeypatch.setattr(doctor, "_SIZE", 64)
    monkeypatch.setattr(kernels, "_READ", 2**20)
    found = examine()
    assert found.speeds.keys() >= {"float32", "bfloat16"}
    assert all(speed > 0 for speed in found.speeds.values())
    assert found.versions["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.device.startswith("cuda" if torch.cuda.is_available() else "cpu")


def test_a_speed_is_about_what_the_size_allows(monkeypatch):
    monkeypatch.setattr(doctor, "_SIZE", 128)
    assert 0.01 < matmul_speed(torch.float32, "cpu") < 1e6
