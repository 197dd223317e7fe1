"""The joint scaling law: the paper's tables, the formulas' own optima, and where it ends."""

from dataclasses import replace
from math import inf, isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY

from expertly.errors import ExpertlyError
from expertly.plan import scaling
from expertly.plan.known import shape_of
from expertly.plan.shape import total

PAPER_TABLE_4 = {
    1: (30.364, -0.1817, 53.984, -0.1965),
    2: (27.798, -0.1780, 66.840, -0.2065),
    4: (24.846, -0.1731, 87.702, -0.2192),
    8: (21.833, -0.1676, 119.913, -0.2338),
    16: (19.016, -0.1617, 167.507, -0.2494),
    32: (16.542, -0.1557, 234.673, -0.2652),
}
# at 1e20 FLOPs: N, D, loss of the formula; N, D of the paper's Table 1
BEST = {
    1: (1.726e9, 9.66e9, 2.5897, 1.7e9, 9.7e9),
    4: (1.213e9, 13.74e9, 2.5540, 1.2e9, 13.9e9),
    8: (0.991e9, 16.82e9, 2.5291, 0.990e9, 17e9),
    32: (0.675e9, 24.71e9, 2.4724, 0.669e9, 24.9e9),
}
SAVED = {1: 1.0, 2: 1.14, 4: 1.36, 8: 1.68, 16: 2.14, 32: 2.79}
# as many parameters in all, E times the tokens of the compute-optimal dense model
RULE_OF_THUMB = (((1.1e9, 8e9, 1), 2.666), ((709e6, 16e9, 2), 2.626), ((426e6, 32e9, 4), 2.597))

budgets = st.floats(1e17, 1e26)
expert_counts = st.floats(1, 64)


@pytest.mark.parametrize("experts", PAPER_TABLE_4)
def test_the_law_for_one_number_of_experts_is_the_papers(experts):
    assert scaling.reduced(experts) == pytest.approx(PAPER_TABLE_4[experts], rel=4e-3)


@pytest.mark.parametrize("experts", BEST)
def test_the_best_model_for_1e20_flops_is_the_papers(experts):
    active, tokens, loss, paper_active, paper_tokens = BEST[experts]
    best = scaling.optimum(1e20, experts)
    assert best == pytest.approx((loss, active, tokens), rel=5e-3)
    assert best.loss == pytest.approx(loss, rel=1e-4)
    assert best[1:] == pytest.approx((paper_active, paper_tokens), rel=2e-2)


@pytest.mark.parametrize("experts", SAVED)
def test_the_flops_saved_at_the_dense_models_loss(experts):
    assert scaling.saving(1e20, experts) == pytest.approx(SAVED[experts], rel=5e-3)


@pytest.mark.parametrize(("sizes", "loss"), RULE_OF_THUMB)
def test_an_moe_of_equal_memory_wins_when_trained_longer(sizes, loss):
    assert scaling.loss(*sizes) == pytest.approx(loss, rel=2e-4)


@given(budgets, expert_counts, st.floats(0.01, 100))
def test_no_other_size_is_better_than_the_optimum(flops, experts, factor):
    best = scaling.optimum(flops, experts)
    other = best.active * factor
    assert isclose(6 * best.active * best.tokens, flops, rel_tol=1e-9)
    assert scaling.loss(other, flops / 6 / other, experts) >= best.loss - 1e-12


@given(budgets, expert_counts)
def test_the_saving_is_the_factor_that_brings_both_to_one_loss(flops, experts):
    less = flops / scaling.saving(flops, experts)
    assert isclose(
        scaling.optimum(less, experts).loss, scaling.optimum(flops, 1).loss, rel_tol=1e-9
    )


@given(st.floats(1e7, 1e12), st.floats(1e9, 1e13), st.floats(1, 32))
def test_the_dense_model_as_good_as_an_moe_has_its_loss(active, tokens, experts):
    dense = scaling.equal_dense(active, tokens, experts)
    if dense < inf:
        loss = scaling.loss(active, tokens, experts)
        assert isclose(scaling.loss(dense, tokens, 1), loss, rel_tol=1e-9)


def test_no_dense_model_is_as_good_where_it_lacks_data():
    assert scaling.loss(1e16, 1e12, 32) < scaling.loss(1e300, 1e12, 1)
    assert scaling.equal_dense(1e16, 1e12, 32) == inf


def test_an_estimate_compares_at_the_same_flops():
    shape = shape_of("mixtral-8x7b")
    found = scaling.estimate(shape, 4e11)
    count = total(shape)
    assert found.experts == 4
    assert found.flops == 6 * count.active * 4e11
    assert found.moe == scaling.loss(count.active, 4e11, 4)
    assert found.dense_equal_compute == scaling.loss(count.active, 4e11, 1)
    assert 6 * count.total * found.dense_tokens == pytest.approx(found.flops)
    assert found.dense_equal_memory == scaling.loss(count.total, found.dense_tokens, 1)
    assert found.saving == scaling.saving(found.flops, 4)
    assert found.moe < found.dense_equal_compute
    assert count.active < found.dense_equal_loss < count.total


def test_a_dense_model_saves_nothing_and_is_its_own_rival():
    found = scaling.estimate(shape_of("llama-3.2-1b"), 2e10)
    assert found.experts == 1
    assert found.moe == found.dense_equal_compute == pytest.approx(found.dense_equal_memory)
    assert found.saving == pytest.approx(1)
    assert found.beyond == ()


EXPANSIONS = {
    "mixtral-8x7b": 8 / 2,
    "qwen3-30b-a3b": 128 / 8,
    "switch-base-8": (12 * 8 + 12) / 24,  # every second of 24 layers is dense
    "llama-2-7b": 1,
}


@pytest.mark.parametrize("name", EXPANSIONS)
def test_the_laws_experts_are_the_expansion_of_the_feed_forward(name):
    assert scaling.expansion(shape_of(name)) == pytest.approx(EXPANSIONS[name])


def test_shared_experts_count_as_held_and_as_used():
    layers = shape_of("deepseek-v3").layers
    expert = 3 * 7168 * 2048
    dense = 3 * 3 * 7168 * 18432
    held, used = 58 * 257 * expert + dense, 58 * 9 * expert + dense
    assert len(layers) == 61
    assert scaling.expansion(shape_of("deepseek-v3")) == pytest.approx(held / used)


def test_a_model_as_the_paper_trained_lies_inside():
    inside = replace(TINY, layers=tuple(one_expert(layer) for layer in TINY.layers))
    assert scaling.estimate(inside, 20 * total(inside).active).beyond == ()


def one_expert(layer):
    return replace(layer, feed_forward=replace(layer.feed_forward, top_k=1))


BEYOND = {
    "mixtral-8x7b": ("goes to 2 experts", "12.9 B active of 46.7 B"),
    "deepseek-v3": ("goes to 8 experts", "shared experts", "in 58 of 61 layers", "37.6 B active"),
    "switch-base-8": ("in 12 of 24 layers", "an encoder"),
    "switch-base-128": ("E = 64.5", "in 12 of 24 layers", "an encoder", "of 7.42 B parameters"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_each_way_out_of_the_fitted_range_is_said(name):
    shape = shape_of(name)
    said = scaling.estimate(shape, 20 * total(shape).active).beyond
    assert len(said) == len(BEYOND[name])
    assert all(words in line for words, line in zip(BEYOND[name], said, strict=True))


@pytest.mark.parametrize(("each", "outside"), [(0.3, 1), (0.5, 0), (74, 0), (76, 1)])
def test_too_few_and_too_many_tokens_are_said(each, outside):
    shape = shape_of("llama-3.2-1b")
    said = scaling.estimate(shape, each * total(shape).active).beyond
    assert len([line for line in said if "tokens per active parameter" in line]) == outside


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: scaling.loss(0, 1e9, 1), "active = 0"),
        (lambda: scaling.loss(1e9, -1, 1), "tokens = -1"),
        (lambda: scaling.loss(1e9, 1e9, 0.5), "experts = 0.5"),
        (lambda: scaling.optimum(inf, 1), "flops = inf"),
        (lambda: scaling.saving(1e20, 0), "experts = 0"),
        (lambda: scaling.equal_dense(1e9, 0, 4), "tokens = 0"),
        (lambda: scaling.estimate(TINY, float("nan")), "tokens = nan"),
    ],
)
def test_sizes_that_cannot_be_are_e202(call, said):
    with pytest.raises(ExpertlyError, match=said) as error:
        call()
    assert error.value.code == "E202"
