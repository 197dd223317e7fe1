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
from expertly.plan.training import METHODS, Layout, training
from expertly.plan.training_job import traffic, training_gpus, training_of
from expertly.plan.training_speed import training_step

GPU = device_of("h100")
NETWORKS = tuple(map(link_of, ("infiniband-400", "ethernet-100")))
SPREAD = Layout(fsdp=8, ep=8)


def ask(name="mixtral-8x7b", device=GPU, **given):
    shape = shape_of(name)
    device = replace(device, memory=given.pop("memory", device.memory))
    needs = {"device": device, "networks": NETWORKS}
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
    [{"context": 32_768}, {"train_batch": 8}, {"checkpointing": False}, {"mixed": False}],
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
    found = training_of(ask(layout=SPREAD, imbalance=asked))["per_gpu"]
    imbalance = 1.5 if asked is None else asked
    planned = training(shape_of("mixtral-8x7b"), layout=SPREAD, imbalance=imbalance)
    assert (found["dispatch"], found["total"]) == (planned.dispatch, planned.total)


def test_without_a_layout_the_memory_is_that_of_the_fewest_gpus():
    question = ask(method="lora")
    found = training_of(question)
    assert (found["asked"], found["fits"]) == (True, True)
    assert found["layout"] == {"fsdp": gpus(question, "lora")["gpus"], "ep": 1, "tp": 1}
    small = training_of(replace(question, device=replace(GPU, memory=1e9)))
    assert not small["fits"]
    assert small["layout"]["fsdp"] == MOST_GPUS


def test_a_batch_that_is_served_is_not_one_that_trains():
    small, large = ask(), ask(batch=1024)
    assert gpus(small) == gpus(large)
    assert training_of(small) == training_of(large)
    assert [row["training_seconds"] for row in traffic(small, 8)] == [
        row["training_seconds"] for row in traffic(large, 8)
    ]


def test_the_issue_of_64_sequences_on_8_gpus():
    question = ask(batch=64, gpus=8)
    assert {method: gpus(question, method)["gpus"] for method in METHODS} == {
        "full": 16,
        "lora": 2,
        "qlora": 1,
    }


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, False),
        ({"gpus": 4, "batch": 2}, False),
        ({"method": "lora"}, True),
        ({"layout": SPREAD}, True),
        ({"train_batch": 1}, True),
    ],
    ids=str,
)
def test_training_is_asked_for_by_its_own_flags(given, asked):
    assert training_of(ask(**given))["asked"] == asked


def test_the_gpus_that_are_there_are_those_it_is_laid_out_on():
    ways = {"fsdp": 4, "ep": 1, "tp": 1}
    assert training_of(ask(gpus=4, method="lora"))["layout"] == ways
    full = training_of(ask(gpus=4, train_batch=1))
    assert (full["layout"], full["fits"]) == (ways | {"ep": 4}, False)
    assert training_of(ask(gpus=4))["layout"]["fsdp"] == 16, "nobody asks to train on the four"
    assert training_of(ask(gpus=8, layout=SPREAD))["layout"] == SPREAD._asdict()


def test_e208_where_the_layout_has_another_number_of_gpus():
    said = r"E208\] --gpus: is 4, but --fsdp 8 x --tp 2 are 16 GPUs\. FIX: leave out"
    for answer in (training_of, lambda question: traffic(question, 4)):
        with pytest.raises(ExpertlyError, match=said):
            answer(ask(gpus=4, layout=Layout(fsdp=8, tp=2)))


def test_a_step_is_at_the_utilisation_of_the_cost_and_its_parts_are_said():
    given = {"layout": SPREAD, "batch": 2, "context": 2048, "imbalance": 1.2}
    question = ask(layout=SPREAD, train_batch=2, context=2048, imbalance=1.2, utilisation=0.3)
    found, step = (
        training_of(question),
        training_step(question.shape, GPU, **given, utilisation=0.3),
    )
    assert (found["batch"], found["utilisation"]) == (2, 0.3)
    assert (found["step_seconds"], found["by_part"]) == (step.seconds, step.by_part)
    assert found["tokens_per_second"] == pytest.approx(8 * 2 * 2048 / step.seconds)
    assert training_of(ask(utilisation=0.4)) == training_of(ask())


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
    question = ask(layout=SPREAD, train_batch=2, batch=64)
    row, shape = rows(question)["ethernet-100"], question.shape
    sent = {"ranks": 8, "tokens": 2 * 4096, "passes": 3, "imbalance": 1.5}
    trains = all_to_all(shape, NETWORKS[1], **sent)
    assert row["training_seconds"] == trains.seconds
    assert row["decode_seconds"] == all_to_all(shape, NETWORKS[1], ranks=8, tokens=8).seconds
    assert row["bytes_per_token_layer"] == trains.bytes_per_token_layer
    uneven = rows(replace(question, imbalance=3.0))["ethernet-100"]
    assert uneven["decode_seconds"] > row["decode_seconds"]
    assert uneven["training_seconds"] > row["training_seconds"]
    kept = rows(replace(question, checkpointing=False))["ethernet-100"]
    assert kept["training_seconds"] == pytest.approx(trains.seconds * 2 / 3)


def test_a_rank_decodes_its_share_of_the_batch_and_one_token_at_least():
    one, eight, nine = (rows(ask(batch=each))["ethernet-100"] for each in (1, 8, 16))
    assert one["decode_seconds"] == eight["decode_seconds"] < nine["decode_seconds"]


def test_gpus_that_share_tensors_share_the_tokens_that_are_sent():
    apart, shared = (rows(ask(layout=Layout(8 // tp, 8, tp))) for tp in (1, 2))
    ratio = apart["ethernet-100"]["training_seconds"] / shared["ethernet-100"]["training_seconds"]
    assert ratio == pytest.approx(2, rel=0.01)


def test_the_share_of_a_step_is_that_of_the_step_with_this_link():
    question = ask(layout=SPREAD, utilisation=0.3)
    step = training_of(question)
    near, far = (rows(question)[name] for name in (GPU.link.name, "infiniband-400"))
    assert near["training_seconds"] == step["by_part"]["all_to_all"]
    assert near["training_share"] == pytest.approx(near["training_seconds"] / step["step_seconds"])
    beside = step["step_seconds"] - near["training_seconds"]
    sent = far["training_seconds"]
    assert far["training_share"] == pytest.approx(sent / (sent + beside))
    slower = rows(replace(question, utilisation=0.15))["infiniband-400"]
    assert slower["training_share"] < far["training_share"]


def test_e208_where_hours_and_utilisation_are_both_said():
    with pytest.raises(ExpertlyError, match=r"E208.*leave out one of the two"):
        traffic(ask(utilisation=0.4, gpu_hours=1e6), 8)
