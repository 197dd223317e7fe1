"""The nucleus against its slow definition, and draws against their probabilities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.engine.sampler import Sampling, choose, likeliest, nucleus, penalized


def slow_nucleus(probs, top_p):
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += probs[i]
        if total >= top_p:
            break
    return kept


@given(st.integers(1, 3000), st.floats(0, 0.999), st.floats(0.01, 8), st.integers(0, 99))
def test_the_nucleus_is_the_fewest_that_reach_top_p(size, top_p, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(size, generator=generator) * spread).double().softmax(0)
    kept, ids = nucleus(probs, top_p)
    assert ids.tolist() == slow_nucleus(probs.tolist(), top_p)[: len(ids)]
    assert kept.sum() >= top_p - 1e-9
    assert len(ids) == 1 or kept[:-1].sum() < top_p
    assert kept.equal(probs[ids])


@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_tokens_are_drawn_as_often_as_their_weight_says(top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    probs = (logits / 0.7).softmax(0)
    kept = torch.zeros(4, dtype=torch.bool)
    kept[slow_nucleus(probs.tolist(), top_p)] = True
    wanted = (probs * kept) / (probs * kept).sum()
    generator, sampling = torch.Generator().manual_seed(0), Sampling(1, 0.7, top_p)
    drawn = torch.tensor([choose(logits, sampling, generator) for _ in range(4000)])
    seen = torch.bincount(drawn, minlength=4) / 4000
    assert (seen - wanted).abs().max() < 0.03
    assert not seen[~kept].any()


@given(st.integers(1, 600), st.integers(0, 99))
def test_the_seed_settles_a_draw(size, seed):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    draws = [choose(logits, Sampling(), torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert draws[0] == draws[1] < size


def test_a_penalty_makes_seen_tokens_less_likely_and_leaves_the_others():
    logits = torch.tensor([3.0, -2.0, 1.0])
    assert penalized(logits, [0, 1, 1], 2.0).tolist() == [1.5, -4.0, 1.0]
    assert penalized(logits, [], 2.0) is logits
    assert penalized(logits, [0], 1.0) is logits
    assert logits.tolist() == [3.0, -2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_likeliest(dtype):
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0], dtype=dtype)
    assert likeliest(logits) == logits.argmax() == 1
