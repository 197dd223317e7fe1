"""What bits cost: EAC-MoE's table where it measured, bounds elsewhere."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY

from expertly.plan.known import shape_of
from expertly.plan.precision import QUANTISABLE, precision
from expertly.plan.quality import ASSUMED, MEAN, quality

# by hand from Table 2: the mean loss of Mixtral, Phi-3.5-MoE, DeepSeek-MoE and Qwen1.5-MoE
MEANS = {3.0: 0.8875, 2.5: 3.105, 2.0: 5.1125}
CASES = [
    (None, 16, 0, "nothing lost"),
    ("16", 16, 0, "nothing lost"),
    ("8", 16, 0.1, "assumed"),
    ("4", 16, 0.5, "assumed"),
    ("16,experts=4", 16, 0.5, "assumed"),
    ("16,attention=4", 16, 0.5, "assumed"),
    ("3,attention=4", 16, 0.8875, "assumed"),
    ("2.5,attention=4", 16, 3.105, "assumed"),
    ("2,attention=4", 16, 5.1125, "assumed"),
    ("3", 16, 0.8875, "assumed"),
    ("3,attention=4", 8, 0.9875, "assumed"),
    (None, 4, 0.5, "assumed"),
    ("6", 16, 0.3, "assumed"),
    ("1,attention=4", 16, 5.1125 + 2 * 2.0075, "assumed"),  # as steep as from 2.5 to 2
]


def test_the_means_are_those_of_the_papers_table():
    assert pytest.approx(MEANS) == MEAN


@pytest.mark.parametrize(("bits", "kv_bits", "points", "known"), CASES)
def test_points_lost_by_a_model_that_nobody_measured(bits, kv_bits, points, known):
    shape = shape_of("olmoe-1b-7b")
    found = quality(shape, precision(shape, None, bits), kv_bits)
    assert found.points == pytest.approx(points)
    assert found.known == known


# by hand from Table 2
ROWS = {
    "mixtral-8x7b": (72.64, 72.21, 69.61, 66.31),
    "phi-3.5-moe": (69.62, 68.49, 66.53, 65.03),
    "deepseek-moe-16b": (61.38, 61.22, 58.33, 57.05),
    "qwen1.5-moe-a2.7b": (64.72, 62.89, 61.47, 59.52),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_models_of_the_table_have_their_own_rows(name):
    shape = replace(shape_of(name), name="a folder of mine")
    full, *scores = ROWS[name]
    for bits, score in zip(("3", "2.5", "2"), scores, strict=True):
        found = quality(shape, precision(shape, None, f"{bits},attention=4"))
        assert found == (pytest.approx(full - score), "measured")
    for bits, kv_bits in [("3", 16), ("3,attention=4", 8), ("2.7,attention=4", 16)]:
        assert quality(shape, precision(shape, None, bits), kv_bits).known == "assumed"


@pytest.mark.parametrize("name", ROWS)
def test_between_what_was_measured_more_bits_lose_less(name):
    shape = shape_of(name)
    lost = [
        quality(shape, precision(shape, None, f"{bits},attention={max(bits, 4)}")).points
        for bits in (2, 2.25, 2.5, 2.75, 3, 3.5, 4, 6, 8, 12, 16)
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[6] <= ASSUMED[4.0] and lost[8] <= ASSUMED[8.0]
    assert lost[-1] == 0


def test_others_of_a_measured_family_are_assumed():
    shape = shape_of("mixtral-8x22b")
    assert quality(shape, precision(shape, None, "3,attention=4")).known == "assumed"


def test_a_checkpoint_in_its_own_group_size_loses_nothing():
    shape = replace(shape_of("mixtral-8x7b"), stored=dict.fromkeys(QUANTISABLE, "int4g32"))
    assert quality(shape, precision(shape)) == (0, "nothing lost")
    assert quality(shape, precision(shape, None, "4")).points > 0


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
