"""Ways to make a model fit: sizes by hand, the order, and what is left out."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY

from expertly.errors import ExpertlyError
from expertly.plan.hardware import device_of, link_of
from expertly.plan.known import shape_of
from expertly.plan.memory import serving
from expertly.plan.options import (
    Need,
    asked,
    fewest_gpus,
    host_link,
    options,
    per_gpu,
    ram,
    smallest,
)
from expertly.plan.precision import precision, weights
from expertly.plan.speed import decode
from expertly.plan.traffic import offload

MIXTRAL = shape_of("mixtral-8x7b")


def need_for(shape=MIXTRAL, gpu="4090", bits=None, **changes):
    device = device_of(gpu)
    settings = {"memory": device.memory} | changes
    return Need(device=device, precision=precision(shape, None, bits), **settings)


def test_every_gpu_holds_its_share_and_all_activations():
    held = asked(MIXTRAL, need_for())
    shared = held.weights.resident + held.kv_cache.resident
    each = held.activations.resident + held.dispatch.resident
    assert each > 0
    assert per_gpu(held, 1) == held.total.resident
    assert per_gpu(held, 4) == shared / 4 + each


@pytest.mark.parametrize(
    ("memory", "gpus"), [(100e9, 1), (80e9, 2), (24e9, 4), (23e9, 8), (1.6e9, None)]
)
def test_the_fewest_gpus_that_hold_94_gb(memory, gpus):
    assert fewest_gpus(asked(MIXTRAL, need_for()), memory) == gpus


def test_mixtral_on_a_4090():
    found = options(MIXTRAL, need_for())
    assert [(way.flags, way.fits) for way in found] == [
        ("--offload pcie4", True),
        ("--bits 8 --offload pcie4", True),
        ("--bits 4 --offload pcie4", True),
        ("--bits 3,attention=4", True),
        ("--gpus 4", False),
        ("--bits 8 --gpus 4", False),
        ("--bits 4 --gpus 2", False),
    ]
    assert [way.quality for way in found] == pytest.approx([0, 0.1, 0.5, 0.8875, 0, 0.1, 0.5])


def test_an_option_reads_as_the_planner_says():
    way = options(MIXTRAL, need_for())[3]
    stored = precision(MIXTRAL, None, "3,attention=4")
    assert way.what == "int3 (attention int4)"
    assert way.known == "measured"
    assert way.resident == serving(MIXTRAL, stored, context=4096).total.resident
    assert way.tokens_per_second == decode(MIXTRAL, stored, device_of("4090")).tokens_per_second


def test_offload_keeps_what_finds_room():
    way = options(MIXTRAL, need_for())[2]
    stored = precision(MIXTRAL, None, "4")
    over = serving(MIXTRAL, stored, context=4096).total.resident - 24e9
    share = over / weights(MIXTRAL, stored)["experts"].resident
    assert way.offloaded == pytest.approx(share)
    assert 0.05 < share < 0.1
    assert way.resident == pytest.approx(24e9)
    assert "7% of the experts (1.69 GB) over pcie4" in way.what
    slow = offload(MIXTRAL, stored, device_of("4090"), link_of("pcie4"), hit_rate=1 - share)
    assert way.tokens_per_second == pytest.approx(slow.slow)


def test_a_hit_rate_and_a_link_that_are_given_are_used():
    way, known, disk = (
        options(MIXTRAL, need_for(**changes))[0]
        for changes in ({}, {"hit_rate": 0.9}, {"offload": link_of("nvme")})
    )
    assert disk.tokens_per_second < way.tokens_per_second < known.tokens_per_second
    assert disk.flags == "--offload nvme"


def test_two_gpus_load_their_halves_at_once():
    one = options(MIXTRAL, need_for(memory=30e9, hit_rate=0.0))[0]
    two = options(MIXTRAL, need_for(memory=15e9, gpus=2, hit_rate=0.0))[0]
    assert one.offloaded == pytest.approx(two.offloaded, rel=0.05)
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second, rel=0.05)


def test_experts_go_where_there_is_ram():
    assert ram(need_for(gpus=2)) == 4 * 2 * 24e9
    assert ram(need_for(ram=64e9)) == 64e9
    assert ram(need_for(gpu="cpu")) == inf  # its disk
    assert ram(need_for(offload=link_of("sata"))) == inf
    assert host_link(need_for()).name == "pcie4"
    ways = options(MIXTRAL, need_for(ram=20e9))
    assert [way.flags for way in ways if way.offloaded] == ["--bits 4 --offload pcie4"]


def test_no_offload_where_the_rest_does_not_fit_or_there_are_no_experts():
    assert not any(way.fits for way in options(MIXTRAL, need_for(memory=1e9)))
    dense = shape_of("llama-2-70b")
    assert not any(way.fits or way.offloaded for way in options(dense, need_for(dense)))


def test_a_smaller_cache_only_where_it_has_to_be():
    long = need_for(gpu="h100", batch=32, context=32768)
    here = [way for way in options(MIXTRAL, long) if way.fits]
    assert [way.flags for way in here] == ["--bits 4 --kv-bits 4"]  # 26 GB and 137 of cache
    assert here[0].what == "int4, KV cache 4 bits"
    assert here[0].quality == pytest.approx(1.0)
    assert "kv" not in " ".join(way.flags for way in options(MIXTRAL, need_for(gpu="h100")))


def test_fewer_gpus_where_fewer_bits_need_no_more():
    found = {way.flags: way for way in options(MIXTRAL, need_for(gpu="h100", gpus=2))}
    assert found[""].gpus == 2
    assert found["--bits 8 --gpus 1"].what == "int8, 1 GPU"
    assert all(way.fits for way in found.values())


def test_many_gpus_talk_over_a_network():
    deepseek = shape_of("deepseek-v3")
    way = options(deepseek, need_for(deepseek))[0]
    assert (way.gpus, way.what) == (32, "fp8, 32 GPUs over infiniband-400")
    assert not way.fits


def test_bits_that_save_nothing_are_no_option():
    oss = shape_of("gpt-oss-20b")
    assert "--bits 8" not in {way.flags for way in options(oss, need_for(oss))}
    low = need_for(bits="3,attention=4")
    assert {way.flags for way in options(MIXTRAL, low)} == {""}


def test_three_points_are_not_lost_for_speed_alone():
    assert all(way.quality < 3 for way in options(MIXTRAL, need_for(gpu="m4-max", memory=64e9)))
    tight = options(MIXTRAL, need_for(memory=18e9))
    assert "--bits 2.5,attention=4" in {way.flags for way in tight}


def test_the_smallest_is_the_last_resort():
    stored = precision(MIXTRAL, None, "2.5,attention=4")
    least = serving(MIXTRAL, stored, context=4096).total.resident
    assert smallest(MIXTRAL, need_for()) == least


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
        options(MIXTRAL, replace(need_for(), **wrong))
    assert error.value.code == "E208"


def test_a_hit_rate_that_is_no_share_is_e208():
    with pytest.raises(ExpertlyError, match="hit-rate") as error:
        options(MIXTRAL, need_for(hit_rate=1.5))
    assert error.value.code == "E208"
