"""Money and energy: DeepSeek-V3's training, implied utilisation, a million tokens."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.plan.cost import UTILISATION, serving_cost, training_cost
from expertly.plan.hardware import Device, Link, device_of
from expertly.plan.known import shape_of
from expertly.plan.training import training_flops

WIRE = Link(name="wire", bandwidth=1e9)
GPU = Device(
    name="gpu",
    memory=8e10,
    bandwidth=2e12,
    flops={"bf16": 1e15, "fp8": 2e15},
    watts=500,
    usd_per_hour=2.0,
    link=WIRE,
    host_link=WIRE,
    network=WIRE,
)
BARE = replace(GPU, flops={"bf16": 1e12}, watts=None, usd_per_hour=None)


def test_deepseek_v3_cost_5_576_million_dollars():
    flops = training_flops(shape_of("deepseek-v3"), 14.8e12, context=4096)
    cost = training_cost(flops, device_of("h800"), gpu_hours=2.788e6, price=2)
    assert cost.usd == pytest.approx(5.576e6)
    assert 0.3 < cost.utilisation < 0.4  # in FP8, against the bf16 peak


def test_hours_money_and_energy_by_hand():
    cost = training_cost(3.6e21, GPU, utilisation=0.5)
    assert (cost.flops, cost.utilisation) == (3.6e21, 0.5)
    assert cost.gpu_hours == pytest.approx(2000)
    assert cost.usd == pytest.approx(4000)
    assert cost.kwh == pytest.approx(1000)
    assert training_cost(3.6e21, GPU, price=3).usd == pytest.approx(3 * 2500)
    assert training_cost(1e20, GPU).utilisation == UTILISATION


def test_a_million_tokens_by_hand():
    cost = serving_cost(1000, GPU, 2)
    assert cost.usd_per_million == pytest.approx(2 * 2 * 1000 / 3600)
    assert cost.kwh_per_million == pytest.approx(2 * 0.5 * 1000 / 3600)
    assert serving_cost(1000, GPU, 2, price=0).usd_per_million == 0


def test_no_price_and_no_watts_are_no_numbers():
    cost = training_cost(1e18, BARE)
    assert (cost.usd, cost.kwh) == (None, None)
    assert training_cost(1e18, BARE, price=1).usd == cost.gpu_hours
    assert serving_cost(5, BARE) == serving_cost(9, BARE)


@given(st.floats(1e6, 1e30), st.floats(0.001, 1))
def test_hours_and_utilisation_imply_each_other(flops, utilisation):
    hours = training_cost(flops, GPU, utilisation=utilisation).gpu_hours
    if hours >= 1e-9:
        back = training_cost(flops, GPU, gpu_hours=hours * (1 + 1e-12))
        assert back.utilisation == pytest.approx(utilisation)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"utilisation": 1.2}, "--utilisation: utilisation 1.2 of the bf16 peak"),
        ({"utilisation": 0}, "--utilisation: utilisation 0 of"),
        ({"utilisation": float("nan")}, "--utilisation: utilisation nan"),
        ({"gpu_hours": 1e-3}, "--gpu-hours: utilisation 2.78e+03 of"),
        ({"gpu_hours": 0}, "--gpu-hours: is 0"),
        ({"gpu_hours": -5.0}, "--gpu-hours: is -5"),
        ({"utilisation": 0.4, "gpu_hours": 1e6}, "leave out one of the two"),
        ({"price": -1}, "--price: is -1"),
        ({"flops": -1.0}, "--flops: is -1"),
    ],
)
def test_e208_for_costs_that_cannot_be(given, said):
    with pytest.raises(ExpertlyError) as caught:
        training_cost(**{"flops": 1e19, "device": GPU, **given})
    assert caught.value.code == "E208"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens_per_second": 0}, "--tokens-per-second: is 0"),
        ({"gpus": 0}, "--gpus: is 0"),
        ({"price": float("inf")}, "--price: is inf"),
    ],
)
def test_e208_for_serving_that_cannot_be(given, said):
    with pytest.raises(ExpertlyError) as caught:
        serving_cost(**{"tokens_per_second": 10.0, "device": GPU, "gpus": 1, **given})
    assert caught.value.code == "E208"
    assert said in str(caught.value)
