"""The growing cache against transformers' own, through whatever is done to one."""

from copy import copy, deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expertly.models.cache import GrowingLayer, growing


def drawn(batch, tokens, dim, seed):
    return torch.randn(batch, 2, tokens, dim, generator=torch.Generator().manual_seed(seed))


STEPS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 70)),
    st.tuples(st.just("crop"), st.integers(0, 5)),
    st.tuples(st.just("reorder"), st.integers(0, 9)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("select"), st.integers(0, 9)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("copy"), st.just(0)),
)


def taken(cache, step, amount, seed):
    """Do one thing to a cache of one layer; the cache to go on with."""
    layer = cache.layers[0] if cache.layers else None
    length = cache.get_seq_length()
    batch = layer.keys.shape[0] if length else 2
    if step == "update":
        keys, values = drawn(batch, amount, 4, seed), drawn(batch, amount, 6, seed + 1)
        cache.update(keys, values, 0)
    elif step == "crop" and length > amount:
        cache.crop(-amount)
    elif step == "reorder" and length:
        cache.reorder_cache(torch.arange(batch).roll(amount))
    elif step == "repeat" and length and batch < 5:
        cache.batch_repeat_interleave(amount)
    elif step == "select" and length:
        cache.batch_select_indices(torch.tensor([amount % batch]))
    elif step == "reset" and layer is not None:
        cache.reset()
    elif step == "copy":
        cache = deepcopy(cache)
    return cache


@torch.no_grad()
@given(st.lists(STEPS, max_size=12))
def test_it_holds_what_the_stock_cache_holds(steps):
    stock, ours = DynamicCache(), growing(DynamicCache())
    for seed, (step, amount) in enumerate(steps):
        stock, ours = (taken(cache, step, amount, seed) for cache in (stock, ours))
        assert ours.get_seq_length() == stock.get_seq_length()
        if stock.get_seq_length():
            assert type(ours.layers[0]) is GrowingLayer
            assert ours.layers[0].keys.equal(stock.layers[0].keys)
            assert ours.layers[0].values.equal(stock.layers[0].values)
            assert ours.get_mask_sizes(3, 0) == stock.get_mask_sizes(3, 0)


@torch.no_grad()
def test_what_update_returns_is_what_it_holds():
    layer = GrowingLayer()
    keys, values = drawn(1, 3, 4, 0), drawn(1, 3, 4, 1)
    made = layer.update(keys, values)
    assert layer._storage is not None
    assert made[0].equal(keys)
    assert made[1].equal(values)


@torch.no_grad()
def test_the_past_stays_where_it_is_until_the_room_is_full():
    layer = GrowingLayer()
    layer.update(drawn(1, 10, 4, 0), drawn(1, 10, 4, 1))
    places = set()
    for seed in range(500):
        layer.update(drawn(1, 1, 4, seed), drawn(1, 1, 4, seed))
        places.add(layer.keys.data_ptr())
    assert layer.get_seq_length() == 510
    assert len(places) <= 7  # 74, 139, 204, 269, 337, 422, 528 tokens


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 100, 1000, 5000])
def test_the_room_behind_a_prompt_is_a_quarter_of_it_or_64_tokens(tokens):
    layer = GrowingLayer()
    layer.update(drawn(1, tokens, 4, 0), drawn(1, tokens, 4, 1))
    for _ in range(2):
        room = layer._storage[0].shape[2]
        assert room <= max(1.25 * layer.get_seq_length(), layer.get_seq_length() + 64)
        more = room + 1 - layer.get_seq_length()
        layer.update(drawn(1, more, 4, 2), drawn(1, more, 4, 3))


@torch.no_grad()
@pytest.mark.parametrize("stock", [DynamicLayer, GrowingLayer])
def test_views_from_before_a_crop_do_not_change(stock):
    layer = stock()
    keys = drawn(1, 6, 4, 0)
    before = layer.update(keys, keys)[0]
    layer.crop(-3)
    layer.update(drawn(1, 3, 4, 2), drawn(1, 3, 4, 3))
    assert before.equal(keys)
    assert layer.keys.equal(torch.cat([keys[:, :, :3], drawn(1, 3, 4, 2)], dim=2))


@torch.no_grad()
def test_a_shallow_copy_goes_its_own_way():
    layer = GrowingLayer()
    keys = drawn(1, 6, 4, 0)
    layer.update(keys, keys)
    copied = copy(layer)
    for each, seed in ((layer, 1), (copied, 2)):
        each.update(drawn(1, 1, 4, seed), drawn(1, 1, 4, seed))
    for each, seed in ((layer, 1), (copied, 2)):
        assert each.keys.equal(torch.cat([keys, drawn(1, 1, 4, seed)], dim=2))
        assert each.get_seq_length() == 7
    assert not copy(GrowingLayer()).is_initialized


def test_two_steps_over_one_cache_can_be_trained_through():
    weight = torch.ones(4, requires_grad=True)
    grads = []
    for kind in (DynamicLayer, GrowingLayer):
        layer, queries = kind(), drawn(1, 1, 4, 9) * weight
        losses = []
        for seed in range(3):  # keys without gradients, as of a frozen projection
            keys, values = layer.update(drawn(1, 1, 4, seed), drawn(1, 1, 4, seed + 1))
            losses.append(((queries * keys).softmax(-1) * values).sum())
        grads += torch.autograd.grad(sum(losses), weight)
    assert grads[0].equal(grads[1])


def test_gradients_go_through_as_in_the_stock_layer():
    keys = drawn(1, 3, 4, 0).requires_grad_()
    layer = GrowingLayer()
    for _ in range(3):
        layer.update(keys, keys * 2)
    (layer.keys.sum() + layer.values.sum()).backward()
    assert keys.grad.equal(torch.full_like(keys, 9.0))


def test_a_cache_made_for_inference_goes_on_outside():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(drawn(1, 3, 4, 0), drawn(1, 3, 4, 1))
    with torch.no_grad():
        layer.update(drawn(1, 1, 4, 2), drawn(1, 1, 4, 3))
    assert layer.keys.equal(torch.cat([drawn(1, 3, 4, 0), drawn(1, 1, 4, 2)], dim=2))


def test_other_layers_and_caches_stay_as_they_are():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(4)]
    assert [type(layer) for layer in growing(cache).layers] == [
        GrowingLayer,
        DynamicSlidingWindowLayer,
    ]
    assert growing(None) is None


def test_a_filled_layer_keeps_its_tokens():
    cache = DynamicCache()
    cache.update(drawn(1, 3, 4, 0), drawn(1, 3, 4, 1), 0)
    assert growing(cache).layers[0].keys.equal(drawn(1, 3, 4, 0))
    cache.update(drawn(1, 1, 4, 2), drawn(1, 1, 4, 3), 0)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("count", [1, 2])
def test_tokens_of_another_batch_are_refused_as_in_the_stock_layer(count):
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(drawn(2, 3, 4, 0), drawn(2, 3, 4, 1))
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer.update(drawn(3, count, 4, 2), drawn(3, count, 4, 3))
    assert layer.get_seq_length() == 3
