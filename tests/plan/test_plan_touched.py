"""Distinct experts of a batch: the formulas against every choice there is, and their bounds."""

from itertools import combinations, product
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.plan.touched import experts_touched, touched_spread

CASES = [(4, 1, 1), (4, 1, 3), (4, 2, 1), (4, 2, 2), (5, 2, 3), (5, 3, 2), (5, 4, 2), (3, 3, 2)]


@pytest.mark.parametrize(("experts", "top_k", "tokens"), CASES)
def test_mean_and_spread_of_every_choice(experts, top_k, tokens):
    choices = product(combinations(range(experts), top_k), repeat=tokens)
    counts = [len(set().union(*choice)) for choice in choices]
    assert experts_touched(experts, top_k, tokens) == pytest.approx(mean(counts))
    assert touched_spread(experts, top_k, tokens) == pytest.approx(pstdev(counts), abs=1e-7)


def test_mixtral_touches_5_47_experts_at_batch_4():
    assert experts_touched(8, 2, 4) == pytest.approx(5.46875)


@given(st.integers(1, 512), st.data())
def test_between_one_tokens_choice_and_all(experts, data):
    top_k = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(1, 2000))
    touched = experts_touched(experts, top_k, tokens)
    assert top_k - 1e-9 <= touched <= min(experts, top_k * tokens) + 1e-9
    assert touched <= experts_touched(experts, top_k, tokens + 1) + 1e-9
    assert 0 <= touched_spread(experts, top_k, tokens) <= experts / 2 + 1e-9


def test_one_token_has_no_spread_and_no_experts_touch_nothing():
    assert touched_spread(64, 8, 1) == pytest.approx(0, abs=1e-6)
    assert touched_spread(1, 1, 5) == 0
    assert experts_touched(0, 0, 5) == 0
    assert touched_spread(0, 0, 5) == 0
