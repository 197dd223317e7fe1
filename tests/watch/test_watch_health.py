"""Watch in somebody's own loop: what it counts, that it changes nothing and leaves no hook."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES
from expertly.models.attach import attach
from expertly.models.layers import moe_layers
from expertly.moe.policy import Policy
from expertly.watch import Watch
from expertly.watch.health import _PROBE_EVERY
from expertly.watch.recorder import count_decisions


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def one_hot(model, layer, expert):
    """Make a router send every token to one expert first."""
    router = moe_layers(model)[layer].router
    router.register_forward_pre_hook(lambda module, args: (args[0] * 0 + 1, *args[1:]))
    router.weight.data[expert] = 5.0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_counts_every_forward_without_padding(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    mask = torch.ones_like(tiny_ids)
    mask[1, -5:] = 0
    with attach(model) as attachment, torch.no_grad():
        model(tiny_ids, attention_mask=mask)
        rule = attachment.rule
        expected = count_decisions(attachment.decisions, attachment.tokens, rule)
    before = hooks(model)
    with Watch(model) as health, torch.no_grad():
        for _ in range(2):
            model(tiny_ids, attention_mask=mask)
        watched = health.read()
    assert hooks(model) == before
    assert health.counts.tokens == 2 * (24 - 5)
    for found, once in zip(health.counts, expected, strict=True):
        torch.testing.assert_close(found, 2 * once)
    assert health.norms.shape == health.counts.load.shape and (health.norms > 0).any()
    assert watched["alarms"] == [] and 0 < watched["entropy_norm"] < 1
    json.dumps(watched)


def trained(model, ids, watched):
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    health = Watch(model)
    if watched:
        with health:
            model(ids, labels=ids).loss.backward()
            health.read()
        assert health.counts.tokens == ids.numel(), "recomputation is not counted"
    else:
        model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters()], torch.get_rng_state()


def test_training_is_the_same_to_the_bit(tiny_model, tiny_ids):
    (grads, state), (alone, state_alone) = (
        trained(tiny_model("mixtral"), tiny_ids, watched) for watched in (True, False)
    )
    assert torch.equal(state, state_alone)
    assert all(torch.equal(a, b) for a, b in zip(grads, alone, strict=True))


def test_one_read_is_enough_for_an_alarm(tiny_model, tiny_ids):
    model = tiny_model("qwen3_moe")
    one_hot(model, 1, 6)
    moe_layers(model)[0].experts.down_proj.data[3] = 0
    with Watch(model) as health, torch.no_grad():
        model(tiny_ids)
        found = {(each["kind"], each["layer"]): each for each in health.read()["alarms"]}
    assert ("collapse", 1) in found and 6 in found["collapse", 1]["experts"]
    assert found["silent", 0]["experts"] == [3]
    assert set(found) == {("collapse", 1), ("saturation", 1), ("silent", 0)}


def test_a_policy_at_work_is_what_is_watched(tiny_model, tiny_ids):
    model = tiny_model("olmoe").train()
    policy = Policy(router="biased_sigmoid_topk", top_k=3, capacity_factor=0.5)
    with attach(model, policy) as attachment, Watch(model) as health:
        attachment.bias[0][2] = 10
        model(tiny_ids)
        watched = health.read()
    assert (health.counts.chosen.sum(-1) == 24 * 3).all()
    assert watched["dropped_frac"] > 0.3 and watched["bias_range"] == 10
    assert "overflow" in {each["kind"] for each in watched["alarms"]}


def test_reads_over_ranks_are_judged_together(tiny_model, tiny_ids):
    calls = []

    def two_ranks(tensors):
        calls.append(len(tensors))
        return [2 * values for values in tensors]

    with Watch(tiny_model("olmoe"), reduce=two_ranks) as health, torch.no_grad():
        health._model(tiny_ids)
        health.read()
        alone = health.norms
    with Watch(tiny_model("olmoe")) as single, torch.no_grad():
        single._model(tiny_ids)
        single.read()
    assert health.counts.tokens == 48 and len(calls) == 2
    torch.testing.assert_close(alone, single.norms, equal_nan=True)


def test_the_probe_looks_again_in_a_long_evaluation(tiny_model, tiny_ids):
    model = tiny_model("olmoe")
    with Watch(model) as health, torch.no_grad():
        for index in range(_PROBE_EVERY + 1):
            # one token, so that the first forward leaves most experts unknown
            model(tiny_ids[:1, :1] if index < _PROBE_EVERY else tiny_ids)
        health.read()
    assert health.norms.isfinite().sum() > 2 * 2


def test_a_router_that_does_not_run_is_named(tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    block = model.model.layers[1].mlp
    block.forward = lambda x: x  # a patched block that routes in its own way
    with Watch(model) as health:
        model(tiny_ids)
        with pytest.raises(ExpertlyError, match=r"E504.*model\.layers\.1\.mlp"):
            health.read()
    with Watch(tiny_model("mixtral")) as idle, pytest.raises(ExpertlyError, match="E504"):
        idle.read()


def test_records_are_read_without_torch():
    code = "import sys, expertly.watch.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'watch'"):
        from expertly import watch

        watch.watch  # noqa: B018
