"""All-to-all against routing that is drawn, and offload against sums made by hand."""

import random
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.plan.hardware import Link, device_of, link_of
from expertly.plan.known import shape_of
from expertly.plan.precision import precision
from expertly.plan.shape import Attention, FeedForward, Layer
from expertly.plan.speed import decode
from expertly.plan.traffic import all_to_all, all_to_all_bytes, offload

V3, MIXTRAL, LLAMA = map(shape_of, ("deepseek-v3", "mixtral-8x7b", "llama-2-70b"))
MOE = V3.moe_layers[0]
LINK = Link(name="wire", bandwidth=1000.0, latency=2.0)
GPU = device_of("4090")
WIRED = replace(GPU, host_link=LINK)
BF16 = precision(MIXTRAL)


def layer_of(experts: int, top_k: int) -> Layer:
    return Layer(attention=Attention(), feed_forward=FeedForward(experts=experts, top_k=top_k))


@pytest.mark.parametrize("ranks", [2, 8, 64, 256])
def test_deepseek_v3_sends_172_kb_for_each_token_and_layer(ranks):
    """8 x 7168 x (1 + 2): fp8 there, bf16 back; 1 of `ranks` parts of it stays at home."""
    naive = all_to_all_bytes(MOE, 7168, ranks, dispatch=1, combine=2, deduplicated=False)
    assert naive * ranks / (ranks - 1) == pytest.approx(172032)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(16, 4, 4), (64, 8, 8), (8, 2, 2)])
def test_ranks_that_a_token_goes_to_against_drawing_them(experts, top_k, ranks):
    chance = random.Random(0)
    on_a_rank = experts // ranks
    others = [
        len({expert // on_a_rank for expert in chance.sample(range(experts), top_k)} - {0})
        for _ in range(20_000)
    ]
    copies = all_to_all_bytes(layer_of(experts, top_k), 1, ranks, dispatch=1, combine=0)
    assert copies == pytest.approx(mean(others), rel=0.02)


@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 32))
def test_once_per_rank_is_never_more_than_once_per_expert(ranks, top_k):
    layer = layer_of(32, top_k)
    once = all_to_all_bytes(layer, 100, ranks)
    naive = all_to_all_bytes(layer, 100, ranks, deduplicated=False)
    assert 0 <= once <= naive + 1e-9
    assert once <= (ranks - 1) * 400
    if ranks == 32 or top_k == 1:
        assert once == pytest.approx(naive), "then no rank has two of a token's experts"


def test_one_rank_and_dense_layers_send_nothing():
    assert all_to_all_bytes(MOE, 7168, 1) == 0
    assert all_to_all_bytes(LLAMA.layers[0], 8192, 8) == 0
    for shape, ranks in ((MIXTRAL, 1), (LLAMA, 8)):
        traffic = all_to_all(shape, LINK, ranks=ranks, tokens=10)
        assert (traffic.seconds, traffic.bytes_per_token_layer) == (0, 0)


@pytest.mark.parametrize("ranks", [3, 16, 0, -2])
def test_e208_for_ranks_that_do_not_divide_the_experts(ranks):
    with pytest.raises(ExpertlyError, match=f"E208.*{ranks} does not divide 8 experts"):
        all_to_all_bytes(MIXTRAL.layers[0], 4096, ranks)


def test_seconds_of_a_step_by_hand():
    size = all_to_all_bytes(MIXTRAL.layers[0], 4096, 4)
    step = all_to_all(MIXTRAL, LINK, ranks=4, tokens=10)
    assert step.bytes_per_token_layer == pytest.approx(size)
    assert step.seconds == pytest.approx(32 * (2 * 2.0 + 10 * size / 1000))
    assert step.link is LINK
    for passes in (2, 3):
        trained = all_to_all(MIXTRAL, LINK, ranks=4, tokens=10, passes=passes)
        assert trained.seconds == passes * step.seconds


def test_the_fullest_rank_sends_longer_not_more_often():
    even, uneven = (
        all_to_all(MIXTRAL, LINK, ranks=4, tokens=10, imbalance=each) for each in (1, 1.5)
    )
    waits = 32 * 2 * LINK.latency
    assert uneven.seconds - waits == pytest.approx(1.5 * (even.seconds - waits))
    assert uneven.bytes_per_token_layer == even.bytes_per_token_layer


def test_deepseek_v3_dense_layers_send_nothing_and_slower_links_take_longer():
    times = []
    for name in ("nvlink4", "infiniband-400", "ethernet-100"):
        traffic = all_to_all(V3, link_of(name), ranks=64, tokens=128)
        each = all_to_all_bytes(MOE, 7168, 64)
        assert traffic.bytes_per_token_layer == pytest.approx(each)
        sent = 58 * 128 * traffic.bytes_per_token_layer / link_of(name).bandwidth
        assert traffic.seconds == pytest.approx(sent + 58 * 2 * link_of(name).latency)
        times.append(traffic.seconds)
    assert times == sorted(times)


def test_mixtral_from_a_disk_and_from_ram():
    """All 22.5 GB of a token's experts over 7 GB/s: a token in 3 s; at 3 bits from RAM it talks."""
    disk = offload(MIXTRAL, BF16, replace(GPU, host_link=link_of("nvme")), hit_rate=0)
    assert disk.bytes_per_token == 32 * 2 * 3 * 4096 * 14336 * 2
    assert disk.slow == pytest.approx(0.31, abs=0.01)
    small = precision(MIXTRAL, bits="3,attention=4")
    ram = offload(MIXTRAL, small, GPU, hit_rate=0.5)
    assert GPU.host_link.name == "pcie4"
    assert 10 < ram.slow < ram.fast < 15


def test_offload_by_hand():
    step = decode(MIXTRAL, BF16, GPU, batch=4, context=100, kv_bits=8).seconds
    found = offload(MIXTRAL, BF16, WIRED, hit_rate=0.75, batch=4, context=100, kv_bits=8)
    misses = 0.25 * 8 * (1 - 0.75**4) * 32
    size = misses * 3 * 4096 * 14336 * 2
    loading = size / 1000 + misses * 2.0
    assert found.bytes_per_token == pytest.approx(size / 4)
    assert found.slow == pytest.approx(4 / (loading + step))
    assert found.fast == pytest.approx(4 / loading)
    assert found.hit_rate == 0.75


def test_several_gpus_share_each_load_over_links_of_their_own():
    alone, four = (offload(MIXTRAL, BF16, WIRED, hit_rate=0.5, gpus=each) for each in (1, 4))
    assert four.bytes_per_token == alone.bytes_per_token
    waits = 0.5 * 2 * 32 * LINK.latency
    assert 1 / four.fast - waits == pytest.approx((1 / alone.fast - waits) / 4)


def test_a_cache_that_always_hits_is_no_offload():
    found = offload(MIXTRAL, BF16, WIRED, hit_rate=1)
    assert found.bytes_per_token == 0
    assert found.slow == found.fast == decode(MIXTRAL, BF16, GPU).tokens_per_second


def test_a_dense_model_has_nothing_to_load():
    assert offload(LLAMA, BF16, WIRED, hit_rate=0).bytes_per_token == 0


@given(st.floats(0, 1), st.integers(1, 64))
def test_more_hits_are_faster(hit_rate, batch):
    device = replace(GPU, host_link=replace(LINK, bandwidth=30e9, latency=1e-5))
    less, more = (
        offload(MIXTRAL, BF16, device, hit_rate=rate, batch=batch)
        for rate in (hit_rate / 2, hit_rate)
    )
    assert less.slow <= more.slow * (1 + 1e-9)
    assert less.slow <= less.fast <= 2 * less.slow * (1 + 1e-9)


@pytest.mark.parametrize("hit_rate", [-0.1, 1.1, 67, float("nan")])
def test_e208_for_a_hit_rate_that_is_no_share(hit_rate):
    with pytest.raises(ExpertlyError, match=f"E208.*hit rate: is {hit_rate:g}, not from 0 to 1"):
        offload(MIXTRAL, BF16, WIRED, hit_rate=hit_rate)
