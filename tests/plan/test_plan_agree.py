"""One plan, one set of numbers: what the tables say, the verdict and its options say too."""

from dataclasses import replace

import pytest

from expertly.plan.hardware import device_of, link_of
from expertly.plan.job import plan
from expertly.plan.known import shape_of
from expertly.plan.precision import precision
from expertly.plan.question import Question
from expertly.plan.units import gb, number


def planned(name, gpu, gpus, **changes):
    shape, device = shape_of(name), device_of(gpu)
    asked = Question(
        shape=shape,
        precision=precision(shape),
        device=device,
        memory=device.memory,
        gpus=gpus,
        links=(device.link,),
    )
    return plan(replace(asked, **changes))


CASES = [
    ("mixtral-8x7b", "h100", 2, {}),
    ("mixtral-8x7b", "h100", 2, {"batch": 8, "context": 8192, "kv_bits": 8}),
    ("mixtral-8x7b", "4090", 16, {"imbalance": 2.0}),
    ("deepseek-v3", "h100", 9, {}),
    ("deepseek-v3", "h200", 8, {"batch": 3}),
    ("llama-2-70b", "h100", 2, {}),
]


@pytest.mark.parametrize(("name", "gpu", "gpus", "changes"), CASES)
def test_the_option_without_flags_is_the_plan_itself(name, gpu, gpus, changes):
    found = planned(name, gpu, gpus, **changes)
    held = found["memory"]["total"]["resident"]
    (same,) = (way for way in found["verdict"]["options"] if not way["flags"])
    assert same["gpus"] == gpus
    assert same["resident"] == held
    assert same["tokens_per_second"] == found["models"][0]["decode_tokens_per_second"]
    assert gb(held) in found["verdict"]["summary"]
    assert found["machine"]["gpus_needed"] <= gpus


@pytest.mark.parametrize(("name", "gpu", "gpus", "changes"), CASES[:-1])
def test_the_speed_against_batch_is_that_of_the_model(name, gpu, gpus, changes):
    found = planned(name, gpu, gpus, **changes)
    rows = {row["batch"]: row["moe"]["tokens_per_second"] for row in found["decode"]["rows"]}
    batch = found["memory"]["batch"]
    assert rows.get(batch) in (None, found["models"][0]["decode_tokens_per_second"])
    speed = number(found["models"][0]["decode_tokens_per_second"])
    assert any(f"{speed} tokens/s" in reason for reason in found["verdict"]["reasons"])


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_section_on_offload_and_the_option_say_the_same(gpus):
    disk = replace(device_of("4090"), host_link=link_of("nvme"))
    found = planned("mixtral-8x7b", "4090", gpus, device=disk, offload=disk.host_link)
    first = found["verdict"]["options"][0]
    assert first["flags"] == "--offload nvme"
    assert found["offload"]["link"] == "nvme"
    assert found["offload"]["slow"] == pytest.approx(first["tokens_per_second"])
    assert found["offload"]["hit_rate"] == pytest.approx(1 - first["offloaded"])


def test_as_many_gpus_as_it_takes():
    found = planned("mixtral-8x7b", "h100", None)
    assert found["machine"]["gpus"] == found["machine"]["gpus_needed"] == 2
    none = planned("deepseek-v3", "h100", None, memory=1e9)
    assert none["machine"]["gpus_needed"] is None
    assert "4,096 GPUs would not hold it" in "".join(none["verdict"]["reasons"])


def test_the_link_is_the_one_that_joins_so_many():
    assert planned("mixtral-8x7b", "h100", 8)["machine"]["link"] == "nvlink4"
    assert planned("mixtral-8x7b", "h100", 16)["machine"]["link"] == "infiniband-400"


def test_the_law_and_the_verdict_are_asked_about_the_same_training():
    found = planned("mixtral-8x7b", "h100", 2, train_tokens=15e12)
    worth = found["scaling_law"]["dense_equal_loss"]
    assert any(
        f"dense model of {worth / 1e9:.3g} B" in each for each in found["verdict"]["reasons"]
    )


def test_routing_takes_the_same_share_everywhere():
    found = planned("switch-base-8", "h100", 2, batch=4, context=100)
    said = f"routing takes {found['decode']['routing_tax']:.0%} of a step"
    assert said in found["verdict"]["reasons"][0]
