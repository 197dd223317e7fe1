"""Ways to make a model fit: sizes by hand, the order, and what is left out."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY, need_for

from expertly.errors import ExpertlyError
from expertly.plan.hardware import device_of
from expertly.plan.known import shape_of
from expertly.plan.memory import kv_cache, serving
from expertly.plan.options import asked, cached, fewest_gpus, options, ram, smallest, stays
from expertly.plan.precision import precision, weights
from expertly.plan.speed import decode
from expertly.plan.traffic import offload

MIXTRAL, DEEPSEEK = shape_of("mixtral-8x7b"), shape_of("deepseek-v3")


def mixtral_on(gpu="4090", **changes):
    return need_for(MIXTRAL, gpu, **changes)


def test_every_gpu_holds_its_share_and_all_activations():
    one, four = (asked(MIXTRAL, mixtral_on(gpus=gpus)) for gpus in (1, 4))
    assert four.weights == one.weights
    assert four.kv_cache == one.kv_cache, "8 key heads"
    for part in ("activations", "dispatch"):
        assert getattr(four, part).resident == 4 * getattr(one, part).resident > 0


@pytest.mark.parametrize(
    ("shape", "gpus", "batch", "times"),
    [
        (MIXTRAL, 8, 1, 1),
        (MIXTRAL, 64, 1, 8),  # 8 key heads
        (MIXTRAL, 64, 2, 4),  # of 2 sequences
        (MIXTRAL, 64, 8, 1),
        (DEEPSEEK, 8, 1, 8),  # a latent is one for all heads
        (DEEPSEEK, 8, 4, 2),
        (DEEPSEEK, 8, 16, 1),
        (DEEPSEEK, 1, 1, 1),
    ],
)
def test_where_a_cache_cannot_be_split_each_gpu_has_it(shape, gpus, batch, times):
    held = asked(shape, need_for(shape, "h200", gpus, batch=batch)).kv_cache
    assert held.resident == held.touched == times * batch * kv_cache(shape, 4096)


def test_layers_split_their_caches_by_their_own_heads():
    layer = TINY.layers[0]
    two, four = (
        replace(layer, attention=replace(layer.attention, shards=shards, window=window))
        for shards, window in ((2, None), (4, 10))
    )
    mixed = replace(TINY, layers=(two, four))
    assert kv_cache(mixed, 100, batch=1, gpus=4) == (2 * 100 + 10) * 128 * 2
    assert kv_cache(mixed, 100, batch=2, gpus=4) == 2 * (100 + 10) * 128 * 2


@pytest.mark.parametrize(
    ("memory", "gpus"), [(100e9, 1), (80e9, 2), (24e9, 4), (23e9, 8), (0.4e9, None)]
)
def test_the_fewest_gpus_that_hold_94_gb(memory, gpus):
    assert fewest_gpus(MIXTRAL, mixtral_on(memory=memory)) == gpus


def test_as_many_as_there_are_may_be_the_fewest():
    assert fewest_gpus(DEEPSEEK, need_for(DEEPSEEK, "h100")) == 16
    assert fewest_gpus(DEEPSEEK, need_for(DEEPSEEK, "h100", 9)) == 9
    assert fewest_gpus(DEEPSEEK, need_for(DEEPSEEK, "h100", 17)) == 16


def test_an_imbalance_takes_room():
    even, uneven = (mixtral_on(imbalance=each) for each in (1, 3))
    assert asked(MIXTRAL, uneven).dispatch.resident == 3 * asked(MIXTRAL, even).dispatch.resident


def test_the_share_of_the_experts_that_is_cached():
    experts = 32 * 8 * 3 * 4096 * 14336 * 2
    rest = asked(MIXTRAL, mixtral_on()).total.resident - experts
    assert cached(MIXTRAL, mixtral_on()) == pytest.approx((24e9 - rest) / experts)
    assert cached(MIXTRAL, mixtral_on(memory=1e9)) == 0
    assert cached(MIXTRAL, mixtral_on(gpus=4)) == 1


def test_mixtral_on_a_4090():
    found = options(MIXTRAL, mixtral_on())
    assert [(way.flags, way.fits) for way in found] == [
        ("--offload pcie4", True),
        ("--bits 8 --offload pcie4", True),
        ("--bits 4 --offload pcie4", True),
        ("--bits 3,attention=4", True),
        ("--gpus 4", False),
        ("--bits 8 --gpus 4", False),
        ("--bits 4 --gpus 2", False),
    ]
    four = 0.5 * 0.43 / 0.8875  # what it loses at 3 bits of what others lose
    assert [way.quality for way in found] == pytest.approx([0, 0.1, four, 0.43, 0, 0.1, four])


def test_an_option_reads_as_the_planner_says():
    way = options(MIXTRAL, mixtral_on())[3]
    stored = precision(MIXTRAL, None, "3,attention=4")
    assert way.what == "int3 (attention int4)"
    assert way.known == "measured"
    assert way.resident == serving(MIXTRAL, stored, context=4096).total.resident
    assert way.tokens_per_second == decode(MIXTRAL, stored, device_of("4090")).tokens_per_second


def test_offload_keeps_what_finds_room():
    way = options(MIXTRAL, mixtral_on())[2]
    stored = precision(MIXTRAL, None, "4")
    over = serving(MIXTRAL, stored, context=4096).total.resident - 24e9
    share = over / weights(MIXTRAL, stored)["experts"].resident
    assert way.offloaded == pytest.approx(share)
    assert 0.05 < share < 0.1
    assert way.resident == 24e9
    assert "7% of the experts (1.69 GB) over pcie4" in way.what
    slow = offload(MIXTRAL, stored, device_of("4090"), hit_rate=1 - share)
    assert way.tokens_per_second == pytest.approx(slow.slow)


def test_a_hit_rate_and_a_link_that_are_given_are_used():
    way, known, disk = (
        options(MIXTRAL, mixtral_on(**changes))[0]
        for changes in ({}, {"hit_rate": 0.9}, {"host_link": "nvme"})
    )
    assert disk.tokens_per_second < way.tokens_per_second < known.tokens_per_second
    assert disk.flags == "--offload nvme"


def test_two_gpus_load_their_halves_at_once():
    one = options(MIXTRAL, mixtral_on(memory=30e9, hit_rate=0.0))[0]
    two = options(MIXTRAL, mixtral_on(memory=15e9, gpus=2, hit_rate=0.0))[0]
    assert one.offloaded == pytest.approx(two.offloaded, rel=0.05)
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second, rel=0.05)


def test_experts_go_where_there_is_ram():
    assert ram(mixtral_on(gpus=2)) == 4 * 2 * 24e9
    assert ram(mixtral_on(ram=64e9)) == 64e9
    assert ram(mixtral_on("cpu")) == inf  # its disk
    assert ram(mixtral_on(host_link="sata")) == inf
    ways = options(MIXTRAL, mixtral_on(ram=20e9))
    assert [way.flags for way in ways if way.offloaded] == ["--bits 4 --offload pcie4"]


def test_no_offload_where_the_rest_does_not_fit_or_there_are_no_experts():
    assert not any(way.fits for way in options(MIXTRAL, mixtral_on(memory=1e9)))
    dense = shape_of("llama-2-70b")
    assert not any(way.fits or way.offloaded for way in options(dense, need_for(dense)))


def test_a_smaller_cache_only_where_it_has_to_be():
    long = mixtral_on("h100", batch=32, context=32768)
    here = [way for way in options(MIXTRAL, long) if way.fits]
    assert [way.flags for way in here] == ["--bits 4 --kv-bits 4"]  # 26 GB and 137 of cache
    assert here[0].what == "int4, KV cache 4 bits"
    assert here[0].quality == pytest.approx(0.5 + 0.5 * 0.43 / 0.8875)
    assert "kv" not in " ".join(way.flags for way in options(MIXTRAL, mixtral_on("h100")))


def test_fewer_gpus_where_fewer_bits_need_no_more():
    found = {way.flags: way for way in options(MIXTRAL, mixtral_on("h100", gpus=2))}
    assert found[""].gpus == 2
    assert found["--bits 8 --gpus 1"].what == "int8, 1 GPU"
    assert all(way.fits for way in found.values())


def test_many_gpus_talk_over_a_network():
    way = options(DEEPSEEK, need_for(DEEPSEEK))[0]
    assert (way.gpus, way.what) == (32, "fp8, 32 GPUs over ethernet-100")
    assert not way.fits


def test_bits_that_save_nothing_are_no_option():
    oss = shape_of("gpt-oss-20b")
    assert "--bits 8" not in {way.flags for way in options(oss, need_for(oss))}
    low = mixtral_on(bits="3,attention=4")
    assert {way.flags for way in options(MIXTRAL, low)} == {""}


def test_fewer_bits_leave_the_rest_as_it_is():
    whole = replace(mixtral_on("h100"), precision=precision(MIXTRAL, "fp32"))
    way = next(way for way in options(MIXTRAL, whole) if way.flags == "--bits 8")
    stored = precision(MIXTRAL, "fp32", "8")
    assert way.resident == serving(MIXTRAL, stored, context=4096).total.resident


def test_gpus_that_the_plan_chose_are_said_beside_other_flags():
    said = mixtral_on("h100", gpus=2)
    chosen = replace(said, gpus_said=False)
    found = [(way.flags, way.gpus) for way in options(MIXTRAL, said)]
    assert found[:2] == [("", 2), ("--bits 8", 2)]
    more = [(way.flags, way.gpus) for way in options(MIXTRAL, chosen)]
    assert more[:2] == [("", 2), ("--bits 8 --gpus 2", 2)]
    away = options(MIXTRAL, replace(mixtral_on(), gpus_said=False))[0]
    assert away.flags == "--offload pcie4 --gpus 1"


def test_what_stays_is_all_but_the_experts_that_are_not_at_work():
    stored = precision(MIXTRAL, None, "2.5,attention=4")
    held = serving(MIXTRAL, stored, context=4096).total.resident
    experts = weights(MIXTRAL, stored)["experts"].resident
    assert stays(MIXTRAL, mixtral_on()) == pytest.approx(held - experts * (1 - 2 / 8 / 32))
    dense = shape_of("llama-2-70b")
    assert stays(dense, need_for(dense)) == smallest(dense, need_for(dense))


def test_three_points_are_not_lost_for_speed_alone():
    assert all(way.quality < 3 for way in options(MIXTRAL, mixtral_on("m4-max", memory=64e9)))
    tight = options(MIXTRAL, mixtral_on(memory=18e9))
    assert "--bits 2.5,attention=4" in {way.flags for way in tight}


def test_the_smallest_is_the_last_resort():
    stored = precision(MIXTRAL, None, "2.5,attention=4")
    least = serving(MIXTRAL, stored, context=4096).total.resident
    assert smallest(MIXTRAL, mixtral_on()) == least


@given(
    st.sampled_from(["mixtral-8x7b", "gpt-oss-20b", "llama-3-8b", "tiny"]),
    st.sampled_from(["4090", "h100", "cpu"]),
    st.floats(1e6, 2e11),
    st.integers(1, 9),
    st.integers(1, 300),
)
def test_options_are_in_order_and_none_beats_another(name, gpu, memory, gpus, batch):
    shape = TINY if name == "tiny" else shape_of(name)
    need = need_for(shape, gpu, memory=memory, gpus=gpus, batch=batch)
    found = options(shape, need)
    order = [(not way.fits, way.quality, -way.tokens_per_second) for way in found]
    assert order == sorted(order)
    for place, way in enumerate(found):
        assert way.fits == (way.gpus <= gpus)
        assert way.resident <= memory * way.gpus * (1 + 1e-9)
        assert 0 <= way.offloaded < 1
        assert not [
            other
            for other in found[:place]
            if way.flags
            and other.gpus <= way.gpus
            and other.quality <= way.quality
            and other.tokens_per_second >= way.tokens_per_second
        ]


@pytest.mark.parametrize("wrong", [{"context": 0}, {"batch": 0}, {"kv_bits": 0.5}])
def test_numbers_out_of_range_are_e208(wrong):
    with pytest.raises(ExpertlyError) as error:
        options(MIXTRAL, replace(mixtral_on(), **wrong))
    assert error.value.code == "E208"


def test_a_hit_rate_that_is_no_share_is_e208():
    with pytest.raises(ExpertlyError, match="hit-rate") as error:
        options(MIXTRAL, mixtral_on(hit_rate=1.5))
    assert error.value.code == "E208"
