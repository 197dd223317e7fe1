"""What bits cost: EAC-MoE's table where it measured, bounds elsewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY

from expertly.plan.known import shape_of
from expertly.plan.precision import precision
from expertly.plan.quality import MEASURED, quality

# by hand from Table 2: the mean loss of Mixtral, Phi-3.5-MoE, DeepSeek-MoE and Qwen1.5-MoE
MEANS = {3.0: 0.8875, 2.5: 3.105, 2.0: 5.1125}
CASES = [
    (None, 16, 0, "nothing lost"),
    ("16", 16, 0, "nothing lost"),
    ("8", 16, 0.1, "assumed"),
    ("4", 16, 0.5, "assumed"),
    ("16,experts=4", 16, 0.5, "assumed"),
    ("16,attention=4", 16, 0.5, "assumed"),
    ("3,attention=4", 16, 0.8875, "measured"),
    ("2.5,attention=4", 16, 3.105, "measured"),
    ("2,attention=4", 16, 5.1125, "measured"),
    ("3", 16, 0.8875, "assumed"),  # EAC-MoE's attention has 4
    ("3,attention=4", 8, 0.9875, "assumed"),
    (None, 4, 0.5, "assumed"),
    ("6", 16, 0.3, "assumed"),
    ("1,attention=4", 16, 5.1125 + 2 * 2.0075, "assumed"),  # as steep as from 2.5 to 2
]


def test_the_means_are_those_of_the_papers_table():
    assert pytest.approx(MEANS) == MEASURED


@pytest.mark.parametrize(("bits", "kv_bits", "points", "known"), CASES)
def test_points_lost(bits, kv_bits, points, known):
    shape = shape_of("mixtral-8x7b")
    found = quality(shape, precision(shape, None, bits), kv_bits)
    assert found.points == pytest.approx(points)
    assert found.known == known


def test_a_models_own_format_loses_nothing():
    for name in ("gpt-oss-20b", "deepseek-v3"):
        shape = shape_of(name)
        assert quality(shape, precision(shape)).points == 0
        assert quality(shape, precision(shape, "bf16")).points == 0
    mxfp4 = shape_of("gpt-oss-20b")
    assert quality(mxfp4, precision(mxfp4, None, "8,attention=16")).points == 0
    assert quality(mxfp4, precision(mxfp4, None, "4")).points == 0.5  # int4 is not mxfp4


def test_what_was_measured_on_moes_is_assumed_of_dense_models():
    shape = shape_of("llama-3-8b")
    assert quality(shape, precision(shape, None, "3,attention=4")) == (
        pytest.approx(MEANS[3]),
        "assumed",
    )


@given(st.floats(1, 16), st.floats(1, 16), st.floats(1, 16))
def test_more_bits_never_lose_more(bits, more, kv_bits):
    low, high = sorted((round(bits, 2), round(more, 2)))
    worse, better = (
        quality(TINY, precision(TINY, None, f"{each:.2f}"), kv_bits) for each in (low, high)
    )
    assert better.points <= worse.points + 1e-9
