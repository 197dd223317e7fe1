"""What a Shape says of itself, and the dense models that compete with it."""

import pytest

from expertly.plan.known import shape_of
from expertly.plan.shape import parameters, rival, total


def test_active_is_all_but_the_idle_experts():
    counts = parameters(shape_of("mixtral-8x7b"))
    assert counts["experts"].active * 4 == counts["experts"].total
    assert all(count.active == count.total for part, count in counts.items() if part != "experts")


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "qwen1.5-moe-a2.7b"])
def test_rivals_have_the_parameters_that_they_are_named_after(name):
    moe = shape_of(name)
    router = parameters(moe)["router"].total
    same_compute, same_memory = rival(moe, memory=False), rival(moe, memory=True)
    assert total(same_compute).total == total(moe).active - router
    assert total(same_memory).total == total(moe).total - router
    assert not same_compute.moe_layers and not same_memory.moe_layers


def test_a_dense_model_is_its_own_rival():
    dense = shape_of("llama-3-8b")
    assert rival(dense, memory=True).layers == dense.layers


def test_a_tied_head_is_seen():
    assert shape_of("llama-3.2-1b").tied
    assert not shape_of("llama-3-8b").tied
