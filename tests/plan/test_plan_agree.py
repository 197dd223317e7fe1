"""One plan, one set of numbers: what the tables say, the verdict and its options say too."""

import json
from dataclasses import replace

import pytest

from expertly.plan.hardware import device_of, link_of
from expertly.plan.job import plan
from expertly.plan.known import shape_of
from expertly.plan.precision import precision
from expertly.plan.question import Question
from expertly.plan.speed import BATCHES, prefill
from expertly.plan.units import gb, number


def planned(name, gpu, gpus, **changes):
    shape, device = shape_of(name), device_of(gpu)
    asked = Question(
        shape=shape,
        precision=precision(shape),
        device=device,
        gpus=gpus,
        networks=(),
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
    assert rows[batch] == found["models"][0]["decode_tokens_per_second"]
    assert [*rows] == sorted({*BATCHES, batch})
    speed = number(found["models"][0]["decode_tokens_per_second"])
    assert any(f"{speed} tokens/s" in reason for reason in found["verdict"]["reasons"])


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_section_on_offload_and_the_option_say_the_same(gpus):
    disk = replace(device_of("4090"), host_link=link_of("nvme"))
    found = planned("mixtral-8x7b", "4090", gpus, device=disk, offloaded=True)
    first = found["verdict"]["options"][0]
    assert first["flags"] == "--offload nvme"
    assert found["offload"]["link"] == "nvme"
    assert found["offload"]["slow"] == pytest.approx(first["tokens_per_second"])
    assert found["offload"]["hit_rate"] == pytest.approx(1 - first["offloaded"])


def test_as_many_gpus_as_it_takes():
    found = planned("mixtral-8x7b", "h100", None)
    assert found["machine"]["gpus"] == found["machine"]["gpus_needed"] == 2
    small = replace(device_of("h100"), memory=1e9)
    none = planned("deepseek-v3", "h100", None, device=small)
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


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-2-70b"])
def test_every_model_has_its_price_at_the_batch_that_is_asked_for(name):
    found = planned(name, "h100", 2, batch=48, price=3.0)
    for model in found["models"]:
        hours = 2e6 / model["decode_tokens_per_second"] / 3600
        assert model["usd_per_million"] == pytest.approx(3 * hours)
        assert model["kwh_per_million"] == pytest.approx(0.7 * hours)
    rows = found["decode"]["rows"] if found["decode"] else []
    for row in (each for each in rows if each["batch"] == 48):
        assert row["moe"]["usd_per_million"] == found["models"][0]["usd_per_million"]
        assert row["dense"]["kwh_per_million"] == found["models"][2]["kwh_per_million"]


@pytest.mark.parametrize(("context", "tokens"), [(512, 512), (2048, 2048), (32_768, 2048)])
def test_a_prompt_is_no_longer_than_the_context(context, tokens):
    model = planned("mixtral-8x7b", "h100", 2, context=context, kv_bits=4)["models"][0]
    shape = shape_of("mixtral-8x7b")
    step = prefill(shape, precision(shape), device_of("h100"), tokens=tokens, kv_bits=4, gpus=2)
    assert model["prefill_tokens"] == tokens
    assert model["prefill_tokens_per_second"] == step.tokens_per_second


QUESTIONS = [
    "mixtral-8x7b",
    "mixtral-8x7b --dtype fp32 --gpu h100",
    "mixtral-8x7b --gpu 4090",
    "mixtral-8x7b --memory 15GB --gpus 2 --hit-rate 0.9",
    "mixtral-8x7b --batch 32 --context 32768 --gpu h100",
    "olmoe-1b-7b --dtype int8 --gpu m4-max",
    "mixtral-8x7b --dtype fp32 --bits 8 --gpu l4 --price 2",
    "mixtral-8x7b --gpu m4-max --dtype fp32",
    "gpt-oss-20b --gpu l4",
    "deepseek-v3 --batch 8 --kv-bits 8",
    "llama-2-70b --gpu 4090 --gpus 3 --bits 8",
]


@pytest.mark.parametrize("words", QUESTIONS)
def test_the_flags_of_an_option_give_its_row(cli, words):
    """A user repeats his own words and adds those of a row."""

    def asked(*more):
        code, out, _ = cli("plan", *words.split(), *more, "--json")
        assert code == 0
        return json.loads(out)

    ways = asked()["verdict"]["options"]
    assert len(ways) > 1
    for way in ways:
        found = asked(*way["flags"].split())
        assert found["machine"]["gpus"] == way["gpus"], way
        ours, held = found["models"][0], found["memory"]["total"]["resident"]
        if way["offloaded"]:
            room = found["machine"]["memory_bytes"] * way["gpus"]
            assert (way["resident"], way["tokens_per_second"]) == (room, found["offload"]["slow"])
            away = (held - room) / ours["bytes_by_part"]["experts"]
            assert way["offloaded"] == pytest.approx(away)
        else:
            assert (held, ours["decode_tokens_per_second"]) == (
                way["resident"],
                way["tokens_per_second"],
            ), way
            assert ours["fits"]
