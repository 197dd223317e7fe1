"""Watch in somebody's own loop: what it counts, that it changes nothing and leaves no hook."""

import copy
import json
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expertly.errors import ExpertlyError
from expertly.models.attach import attach
from expertly.models.experts import register_experts
from expertly.models.layers import moe_layers
from expertly.moe.policy import Policy
from expertly.scale.reduce import sum_over_ranks
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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_it_counts_every_forward_without_padding(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    mask = torch.ones_like(tiny_ids)
    mask[1, -5:] = 0
    with attach(model) as attachment, torch.no_grad():
        model(tiny_ids, attention_mask=mask)
        rule = attachment.rule
        expected = count_decisions(attachment.decisions, attachment.tokens_by_layer, rule)
    before = hooks(model)
    with Watch(model) as health, torch.no_grad():
        for _ in range(2):
            model(tiny_ids, attention_mask=mask)
        watched = health.read()
    assert hooks(model) == before
    assert health.counts.tokens.eq(2 * (24 - 5)).all()
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
        assert health.counts.tokens.eq(ids.numel()).all(), "recomputation is not counted"
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
        for _ in range(4):  # 24 assignments per expert
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
    assert health.counts.tokens.eq(48).all() and calls == [1, 7, 2], "a flag, the counts, the norms"
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


def on_rank(rank, file, results, model, ids):
    """Three reads: one rank's block is patched away, one rank saw no forward, all is well."""
    torch.set_num_threads(1)
    register_experts()
    store = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{file}", **store)
    try:
        said = []
        patched = copy.deepcopy(model)
        if rank == 0:
            patched.model.layers[1].mlp.forward = lambda x: x
        for watched, times in ((patched, 1), (model, rank), (model, 1)):
            with Watch(watched, reduce=sum_over_ranks) as health, torch.no_grad():
                for _ in range(times):
                    watched(ids)
                try:
                    health.read()
                    said.append(str(int(health.counts.tokens[0])))
                except ExpertlyError as error:
                    said.append(str(error))
        torch.save([said, health.norms], f"{results}{rank}")
    finally:
        dist.destroy_process_group()


def test_what_one_rank_did_not_see_is_an_error_on_all(tmp_path, tiny_model, tiny_ids):
    given = (tmp_path / "meet", tmp_path / "rank", tiny_model("mixtral"), tiny_ids)
    mp.spawn(on_rank, args=given, nprocs=2)
    (first, norms), (second, _) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    other = "E504.*another rank"
    for texts, patterns in (
        (first, [r"E504.*model\.layers\.1\.mlp.*did not run", "E504.*no forward", "48"]),
        (second, [other, other, "48"]),
    ):
        for text, pattern in zip(texts, patterns, strict=True):
            assert re.search(pattern, text), text
    assert norms.shape == (2, 8) and norms.isfinite().any()


@pytest.mark.parametrize(
    ("ranks", "reduce", "warns"),
    [("2", None, True), ("1", None, False), ("", None, False), ("2", list, False)],
)
def test_counting_one_rank_of_several_is_said(
    ranks, reduce, warns, tiny_model, monkeypatch, caplog
):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with Watch(tiny_model("olmoe"), reduce=reduce):
        pass
    said = [record.message for record in caplog.records]
    assert len(said) == warns
    assert not warns or "expertly.scale.reduce.sum_over_ranks" in said[0]


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_a_compiled_or_checkpointed_training_step_counts_the_same(how, tiny_model, tiny_ids):
    counts = []
    for changed in (False, True):
        model = tiny_model("mixtral", num_hidden_layers=1).train()
        step = model
        if changed and how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with Watch(model) as health:
            if changed and how == "compiled":
                step = torch.compile(model, backend="eager")
            for _ in range(2):
                step(input_ids=tiny_ids, labels=tiny_ids).loss.backward()
            assert health.read()["alarms"] == []
        counts.append((*health.counts, health.norms))
    assert counts[0][-2] == 48
    for plain, other in zip(*counts, strict=True):
        torch.testing.assert_close(other, plain, equal_nan=True)


def test_records_are_read_without_torch():
    code = "import sys, expertly.watch.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'watch'"):
        from expertly import watch

        watch.watch  # noqa: B018
