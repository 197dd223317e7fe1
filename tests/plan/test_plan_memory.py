"""Serving memory: the KV caches of the papers, windows, and what grows with what."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import ATTENTION, LAYER, TINY

from expertly.errors import ExpertlyError
from expertly.plan.known import shape_of
from expertly.plan.memory import kv_cache, kv_per_token, serving
from expertly.plan.precision import precision
from expertly.plan.shape import Attention, rival


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek-v2", 34560),
        ("deepseek-v3", 35136),
        ("deepseek-67b", 194560),
        ("mixtral-8x7b", 65536),
        ("llama-2-70b", 163840),
    ],
)
def test_elements_of_the_cache_per_token(name, elements):
    assert kv_per_token(shape_of(name), kv_bits=8) == elements
    assert kv_per_token(shape_of(name)) == 2 * elements


def test_deepseek_v2_saves_82_2_percent_by_architecture_and_93_3_with_6_bits():
    latent, grouped = shape_of("deepseek-v2"), kv_per_token(shape_of("deepseek-67b"))
    assert round(100 * (1 - kv_per_token(latent) / grouped), 1) == 82.2
    assert round(100 * (1 - kv_per_token(latent, kv_bits=6) / grouped), 1) == 93.3


def test_a_window_keeps_only_so_many_tokens():
    windowed = replace(LAYER, attention=replace(ATTENTION, window=100))
    mixed = replace(TINY, layers=(LAYER, windowed, LAYER, windowed))
    assert kv_cache(mixed, 100) == kv_cache(TINY, 100) == 100 * kv_per_token(TINY)
    assert kv_cache(mixed, 1000) == (2 * 1000 + 2 * 100) * 128 * 2
    assert kv_per_token(mixed) == kv_per_token(TINY)


def test_the_encoder_has_no_cache():
    assert kv_per_token(replace(TINY, encoder=(LAYER,) * 4)) == kv_per_token(TINY)


def plan(shape=TINY, **given):
    return serving(shape, precision(shape), **{"context": 64, **given})


def test_every_part_of_the_sum_by_hand():
    memory = plan(batch=2)
    assert memory.kv_cache == (2 * 64 * 4 * 128 * 2,) * 2
    # two prompts of 64 tokens; residual 64; norm 64; queries 64, keys and values 128, answers 64
    assert memory.activations.resident == 2 * 128 * (64 + 64 + 256) + 4 * 1000 * 2
    assert memory.activations.touched == 2 * 2 * 4 * (64 + 64 + 256) + 4 * 1000 * 2
    # two experts each: a copy 64, gate, up and product 3 x 32, an answer 64
    assert memory.dispatch.resident == 2 * 128 * 2 * (64 + 96 + 64)
    assert memory.dispatch.touched == 2 * 2 * 4 * 2 * (64 + 96 + 64)
    parts = (memory.weights, memory.kv_cache, memory.activations, memory.dispatch)
    assert memory.total.resident == sum(part.resident for part in parts)
    assert memory.total.touched == sum(part.touched for part in parts)


def test_a_prefill_takes_2048_tokens_at_a_time():
    short, whole, long = (plan(context=context) for context in (2047, 2048, 100_000))
    for part in ("activations", "dispatch"):
        assert getattr(short, part).resident < getattr(whole, part).resident
        assert getattr(whole, part) == getattr(long, part)


def test_a_latent_is_unfolded_in_prefill():
    # a latent of 24 and 8 turned, four heads of 24 for queries and keys, 16 for values
    latent = Attention(weights=1, width=64, cache=32, pair=160, absorbed=4 * (32 + 24))
    moved = replace(TINY, layers=(replace(LAYER, attention=latent),))
    memory = plan(moved)
    assert memory.activations.resident == 2 * 64 * (64 + 64 + 96 + 160 + 64) + 4 * 1000
    assert memory.kv_cache.resident == 64 * 32 * 2


def test_without_a_gate_an_expert_has_two_results_not_three():
    assert plan(replace(TINY, gated=False)).dispatch.resident == 2 * 64 * 2 * (64 + 64 + 64)


def test_imbalance_weighs_on_the_dispatch_alone():
    even, uneven = plan(), plan(imbalance=1.5)
    assert uneven.dispatch.resident == 1.5 * even.dispatch.resident
    assert replace(uneven, dispatch=even.dispatch) == even


def test_the_dense_rival_has_no_dispatch_and_reads_all_that_it_has():
    dense = rival(TINY, memory=False)
    memory = plan(dense)
    assert memory.dispatch == (0, 0)
    rows = 2 * (dense.embeddings - dense.dim)
    assert memory.weights.touched == memory.weights.resident - rows


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"context": 0}, "--context: is 0, expected a number from 1."),
        ({"batch": -1}, "--batch: is -1"),
        ({"kv_bits": 64}, "--kv-bits: is 64, expected a number from 1 to 32."),
        ({"kv_bits": float("nan")}, "--kv-bits: is nan"),
        ({"imbalance": 0.5}, "--imbalance: is 0.5"),
        ({"context": 1e300}, "--context: is 1e+300"),
    ],
)
def test_e208_for_numbers_out_of_range(given, said):
    with pytest.raises(ExpertlyError) as caught:
        plan(**given)
    assert caught.value.code == "E208"
    assert said in str(caught.value)


@given(st.integers(1, 10**6), st.integers(1, 4096), st.sampled_from([4, 6, 8, 16]))
def test_more_of_anything_takes_no_less(context, batch, kv_bits):
    here = plan(context=context, batch=batch, kv_bits=kv_bits).total
    for more in ({"context": context + 1}, {"batch": batch + 1}, {"kv_bits": 2 * kv_bits}):
        there = plan(**{"context": context, "batch": batch, "kv_bits": kv_bits, **more}).total
        assert there.resident >= here.resident
        assert there.touched >= here.touched
