"""What an upcycling can be told, and what not."""

import pytest

from expertly.config import build, dump, load
from expertly.errors import ExpertlyError
from expertly.upcycle.config import UpcycleConfig

GIVEN = {"model": "dense", "output_dir": "moe"}


def test_defaults_and_everything_said(tmp_path):
    assert build(UpcycleConfig, GIVEN) == UpcycleConfig(model="dense", output_dir="moe")
    said = {**GIVEN, "num_experts": 16, "slices": 4, "top_k": 4, "drop": 0.5, "drop_apart": True}
    config = build(UpcycleConfig, {**said, "noise": 1, "router": "clusters", "data": ["a", "b"]})
    (tmp_path / "job.yaml").write_text(dump(config))
    assert load(UpcycleConfig, tmp_path / "job.yaml") == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_experts": 0}, "num_experts: must be at least 1"),
        ({"top_k": 0}, "top_k: must be at least 1"),
        ({"slices": 0}, "slices: must be at least 1"),
        ({"every": 0}, "every: must be at least 1"),
        ({"drop": 1.01}, "drop: must be from 0 to 1"),
        ({"drop": -0.1}, "drop: must be from 0 to 1"),
        ({"drop": float("nan")}, "drop: got NaN, expected a finite number"),
        ({"drop_apart": True}, "drop_apart: says how units are dropped, and drop is 0"),
        ({"noise": 1.5}, "noise: must be from 0 to 1"),
        ({"router": "zero", "slices": 2}, "router: zero ties all experts"),
        ({"router": "prompts"}, "expected random or zero or clusters"),
        ({"data": []}, "data: must name some text"),
        ({"tokens": 63}, "tokens: must be at least 64"),
        ({"seed": -1}, "seed: must be from 0"),
        ({"seed": 2**63}, "seed: must be from 0"),
    ],
)
def test_values_that_cannot_be(given, said):
    with pytest.raises(ExpertlyError, match="E202") as caught:
        build(UpcycleConfig, {**GIVEN, **given})
    assert said in str(caught.value)


def test_a_key_that_is_none():
    with pytest.raises(ExpertlyError, match=r"E201.*experts.*num_experts"):
        build(UpcycleConfig, {**GIVEN, "experts": 8})
