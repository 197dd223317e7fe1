"""The part of a plan about training: what a question's numbers do to GPUs, bytes and traffic."""

from dataclasses import replace

import pytest

from expertly.errors import ExpertlyError
from expertly.plan.hardware import device_of, link_of
from expertly.plan.known import shape_of
from expertly.plan.options import MOST_GPUS
from expertly.plan.precision import precision
from expertly.plan.question import Question
from expertly.plan.traffic import all_to_all
from expertly.plan.training import Layout, training
from expertly.plan.training_job import costs, traffic, training_gpus, training_memory

GPU = device_of("h100")
NETWORKS = tuple(map(link_of, ("infiniband-400", "ethernet-100")))
SPREAD = Layout(fsdp=8, ep=8)


def ask(name="mixtral-8x7b", device=GPU, **given):
    shape = shape_of(name)
    needs = {"device": device, "memory": device.memory, "links": (device.link, *NETWORKS)}
    return Question(shape=shape, precision=precision(shape), **needs | given)


def gpus(question, method="full"):
    return training_gpus(question, question.shape, method)


def test_deepseek_v3_needs_its_experts_spread():
    found = gpus(ask("deepseek-v3"))
    assert (found["gpus"], found["ep"], found["largest"]) == (256, 256, None)
    held = training(shape_of("deepseek-v3"), layout=Layout(fsdp=256, ep=256))
    assert found["per_gpu_bytes"] == held.total <= 80e9


def test_where_4096_are_too_few_it_says_what_is_too_large():
    found = gpus(ask("llama-3-8b", memory=10e9, context=8192))
    held = training(shape_of("llama-3-8b"), layout=Layout(fsdp=MOST_GPUS), context=8192)
    assert (found["gpus"], found["per_gpu_bytes"]) == (None, held.total)
    assert found["largest"] == {"part": "logits", "bytes": held.logits}


@pytest.mark.parametrize(
    "more",
    [{"context": 32_768}, {"batch": 8}, {"checkpointing": False}, {"mixed": False}],
    ids=str,
)
def test_what_is_asked_counts_for_the_gpus_too(more):
    question = ask("llama-3-8b", device_of("4090"))
    least, most = gpus(question), gpus(replace(question, **more))
    assert (most["gpus"] or 2 * MOST_GPUS) > least["gpus"]


def test_the_rank_counts_for_adapters_alone():
    low, high = ask(rank=8), ask(rank=512)
    assert gpus(low) == gpus(high)
    assert gpus(low, "lora")["gpus"] < gpus(high, "lora")["gpus"]


@pytest.mark.parametrize("asked", [None, 1.0, 1.2, 2.0])
def test_an_imbalance_that_is_asked_for_is_the_one_that_is_planned(asked):
    found = training_memory(ask(layout=SPREAD, imbalance=asked))["per_gpu"]
    imbalance = 1.5 if asked is None else asked
    planned = training(shape_of("mixtral-8x7b"), layout=SPREAD, imbalance=imbalance)
    assert (found["dispatch"], found["total"]) == (planned.dispatch, planned.total)


def test_without_a_layout_the_memory_is_that_of_the_fewest_gpus():
    question = ask(method="lora")
    found = training_memory(question)
    assert (found["asked"], found["fits"]) == (True, True)
    assert found["layout"] == {"fsdp": gpus(question, "lora")["gpus"], "ep": 1, "tp": 1}
    assert not training_memory(replace(question, memory=1e9))["fits"]
    assert training_memory(replace(question, memory=1e9))["layout"]["fsdp"] == MOST_GPUS


def rows(question, at=1):
    return {each["link"]: each for each in traffic(question, at)}


def test_nvlink_joins_one_machine_and_networks_join_more():
    assert [*rows(ask(layout=SPREAD))] == [GPU.link.name, "infiniband-400", "ethernet-100"]
    far = rows(ask("deepseek-v3", layout=Layout(fsdp=64, ep=64)))
    assert [*far] == ["infiniband-400", "ethernet-100"]
    assert {each["ranks"] for each in far.values()} == {64}


@pytest.mark.parametrize(
    ("name", "at", "ranks"),
    [("mixtral-8x7b", 1, 8), ("mixtral-8x7b", 64, 8), ("qwen1.5-moe-a2.7b", 8, 6)],
)
def test_without_a_layout_as_many_ranks_as_gpus_divide_the_experts(name, at, ranks):
    assert {each["ranks"] for each in rows(ask(name), at).values()} == {ranks}


def test_a_dense_model_sends_nothing():
    assert traffic(ask("llama-2-70b"), 8) == []


def test_a_row_has_a_training_step_and_a_decode_step():
    question = ask(layout=SPREAD, batch=2)
    row, shape = rows(question)["ethernet-100"], question.shape
    sent = {"ranks": 8, "tokens": 2 * 4096, "backward": True, "imbalance": 1.5}
    trains = all_to_all(shape, NETWORKS[1], **sent)
    assert row["training_seconds"] == trains.seconds
    assert row["decode_seconds"] == all_to_all(shape, NETWORKS[1], ranks=8, tokens=2).seconds
    assert row["bytes_per_token_layer"] == trains.bytes_per_token_layer
    uneven = rows(replace(question, imbalance=3.0))["ethernet-100"]
    assert uneven["decode_seconds"] > row["decode_seconds"]
    assert uneven["training_seconds"] > row["training_seconds"]


def test_the_share_of_a_step_is_at_the_utilisation_of_the_cost():
    question = ask(layout=SPREAD, train_tokens=1e12)
    found = rows(question)["infiniband-400"]
    cost = costs(question)
    compute = cost["gpu_hours"] * 3600 / 1e12 * 4096  # seconds of one GPU for a step's tokens
    sent = found["training_seconds"]
    assert found["training_share"] == pytest.approx(sent / (sent + compute))
    slower = replace(question, gpu_hours=2 * cost["gpu_hours"])
    assert costs(slower)["utilisation"] == pytest.approx(cost["utilisation"] / 2)
    share = rows(slower)["infiniband-400"]["training_share"]
    assert share == pytest.approx(sent / (sent + 2 * compute))


def test_e208_where_hours_and_utilisation_are_both_said():
    with pytest.raises(ExpertlyError, match=r"E208.*leave out one of the two"):
        traffic(ask(utilisation=0.4, gpu_hours=1e6), 8)
