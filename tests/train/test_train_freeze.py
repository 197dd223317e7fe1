"""Parts that stand still for a while: what moves when, what the receipt says, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly import receipts
from expertly.errors import ExpertlyError
from expertly.folders import sha256
from expertly.train import loop
from expertly.train.config import FREEZABLE
from expertly.train.freeze import frozen_parts, thawed
from expertly.train.guard import Guard
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder
from expertly.watch.records import METRICS, read_records

SCHEDULES = st.dictionaries(st.sampled_from(FREEZABLE), st.integers(-1, 6))


@given(SCHEDULES, st.integers(0, 8))
def test_what_stands_still(freeze, step):
    still = frozen_parts(step, freeze)
    for part in FREEZABLE:
        steps = freeze.get(part, 0)
        assert (part in still) == (steps == -1 or step < steps)
    line = thawed(step, freeze) or ""
    begins = {part for part, steps in freeze.items() if steps == step > 0}
    assert all(part in line for part in begins)
    assert bool(begins) == bool(line)


def part_of(name: str) -> str:
    if ".mlp.gate." in name:
        return "router"
    return next((part for part in ("experts", "self_attn") if f".{part}." in name), "rest")


def steps(configure, tmp_path, count, *overrides):
    """Per step the parts of a tiny run that moved, and the names with a gradient; and its job."""
    config = configure(tmp_path / "run", *overrides)
    job = prepare(config, None, lambda line: None)
    recorder, guard = Recorder(job.attachment.rule), Guard(config.optim)
    moved = []
    for step in range(count):
        before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
        train_step(config, job, recorder, guard, step)
        after = job.model.named_parameters()
        moved.append({part_of(name) for name, p in after if not p.equal(before[name])})
    return moved, job


@pytest.mark.parametrize("more", [[], ["gradient_checkpointing=true"], ["max_grad_norm=0.1"]])
def test_parts_move_one_after_the_other(configure, tmp_path, more):
    freeze = "optim.freeze={all_but_router: 2, experts: 3, attention: -1}"
    moved, job = steps(configure, tmp_path, 4, freeze, *more)
    assert moved == [{"router"}, {"router"}, {"router", "rest"}, {"router", "rest", "experts"}]
    held = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    for name, parameter in job.model.named_parameters():
        throughout = part_of(name) == "self_attn"
        assert (id(parameter) in held) == (not throughout), name
        assert (parameter in job.optimizer.state) == (not throughout), name


def test_what_stands_still_costs_no_backward(configure, tmp_path):
    config = configure(tmp_path / "run", "optim.freeze={all_but_router: 5}")
    job = prepare(config, None, lambda line: None)
    job.freeze.at(0)
    ids = next(job.batches).input_ids
    job.model(ids, labels=ids).loss.backward()
    graded = {part_of(name) for name, p in job.model.named_parameters() if p.grad is not None}
    assert graded == {"router"}
    job.freeze.at(5)
    assert all(p.requires_grad for p in job.model.parameters())


def test_0_steps_are_none_and_frozen_routers_stay_frozen(configure, tmp_path):
    moved, _ = steps(configure, tmp_path, 1, "optim.freeze={experts: 0, attention: 1}")
    assert moved == [{"router", "experts", "rest"}]
    frozen = ("optim.freeze={attention: 1}", "optim.router_learning_rate=0")
    moved, _ = steps(configure, tmp_path, 2, *frozen)
    assert moved == [{"experts", "rest"}, {"experts", "rest", "self_attn"}]


def test_a_dense_models_attention(configure, tmp_path):
    overrides = ["max_steps=3", "model.twin=true", "optim.freeze.attention=-1"]
    run = loop.run(configure(tmp_path / "run", *overrides))
    checks = {check.name: check for check in receipts.read(run.run).checks}
    assert checks["parameters frozen throughout that changed"].passed


def test_norms_around_attention_are_not_of_it(configure, tmp_path):
    config = configure(tmp_path / "run", "optim.freeze={attention: 5}")
    job = prepare(config, None, lambda line: None)
    job.freeze.at(0)
    still = {name for name, p in job.model.named_parameters() if not p.requires_grad}
    assert "model.layers.0.self_attn.q_norm.weight" in still
    assert "model.layers.0.post_attention_layernorm.weight" not in still


def resumed_and_whole(configure, tmp_path, *overrides):
    """A run in one go, and the same stopped in the middle and gone on with; lines of the log."""
    whole = loop.run(configure(tmp_path / "whole", *overrides))
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "router.jsonl", "checkpoint-6"):
        (whole.run / name).rename(run / name)
    return loop.run(configure(run, *overrides), resume=True), whole


def test_resumed_is_unbroken(configure, tmp_path, capfd):
    freeze = "optim.freeze={all_but_router: 5, experts: 8, attention: -1}"
    resumed, whole = resumed_and_whole(configure, tmp_path, freeze)
    for name in ("model.safetensors", "expertly/optimizer.safetensors"):
        assert sha256(resumed.checkpoint / name) == sha256(whole.checkpoint / name), name
    ours, theirs = receipts.read(resumed.run), receipts.read(whole.run)
    assert (ours.checks, ours.changed) == (theirs.checks, theirs.changed)
    assert "parameters frozen throughout that changed" in {check.name for check in ours.checks}
    said = capfd.readouterr().err
    first = "step 6: no longer frozen: all_but_router; still frozen: attention, experts"
    assert said.count(first) == 1
    assert said.count("step 9: no longer frozen: experts; still frozen: attention") == 2
    with pytest.raises(ExpertlyError, match=r"E206.*optim.freeze.experts: 8 -> 9"):
        loop.run(configure(resumed.run, freeze.replace("8", "9")), resume=True)


@pytest.mark.parametrize("steps", [-1, 4])
def test_experts_that_never_move_are_no_failure(configure, tmp_path, steps):
    run = loop.run(configure(tmp_path / "run", "max_steps=4", f"optim.freeze.experts={steps}"))
    receipt = receipts.read(run.run)
    assert receipt.verdict == "pass"
    assert receipt.changed["experts"] == "0 of 8"
    names = {check.name: check.figure for check in receipt.checks}
    assert names["parameters frozen throughout that changed"] == 0
    assert "experts that received tokens but did not change" not in names


def test_a_frozen_part_that_changed_fails(configure, tmp_path):
    config = configure(tmp_path / "run", "optim.freeze.experts=-1")
    job = prepare(config, None, lambda line: None)
    proof = loop.Proof(job.attachment, job.freeze)
    assert proof.frozen_moved() == 0
    with torch.no_grad():
        job.attachment.layers[0].experts.down_proj[0] += 1
    assert proof.frozen_moved() == 1


def test_experts_are_held_to_the_tokens_that_they_could_learn_from(configure, tmp_path):
    config = configure(tmp_path / "run", "optim.freeze.experts=5")
    job = prepare(config, None, lambda line: None)
    proof, recorder = loop.Proof(job.attachment, job.freeze), Recorder(job.attachment.rule)
    counts = train_step(config, job, recorder, Guard(config.optim), 0).counts
    proof.add(counts, moving=job.freeze.experts_move(0))
    assert (proof.idle(), proof.unmoved()) == (0, 0)
    proof.add(counts, moving=job.freeze.experts_move(5))
    assert proof.unmoved() == 8


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optim.freeze={expert: 5}"], r"E202.*optim.freeze.expert: no such part; write experts"),
        (["optim.freeze={experts: -2}"], r"E202.*optim.freeze.experts: .*-1 for all"),
        (["optim.freeze={experts: yes}"], r"E202.*optim.freeze.experts: got true"),
        (["optim.freeze=[experts]"], r"E202.*optim.freeze: got a list, expected a mapping"),
        (
            ["optim.freeze={all_but_router: 5}", "optim.router_learning_rate=0"],
            r"E202.*optim.freeze: nothing would learn",
        ),
        (
            ["router.straight_through=true", "optim.router_learning_rate=0"],
            r"E202.*router.straight_through: it is for routers that learn",
        ),
    ],
)
def test_what_cannot_be_is_refused(configure, tmp_path, overrides, line):
    with pytest.raises(ExpertlyError, match=line):
        configure(tmp_path / "run", *overrides)


@pytest.mark.parametrize("part", ["experts", "all_but_router"])
def test_a_dense_model_has_no_such_part(configure, tmp_path, part):
    config = configure(tmp_path / "run", "model.twin=true", f"optim.freeze={{{part}: 5}}")
    with pytest.raises(ExpertlyError, match=rf"E202.*optim.freeze.{part}: a dense model"):
        prepare(config, None, lambda line: None)


def test_a_run_with_straight_through_routers(configure, tmp_path):
    runs = [
        loop.run(configure(tmp_path / name, "max_steps=3", *more))
        for name, more in (("plain", []), ("mixed", ["router.straight_through=true"]))
    ]
    first, other = (
        next(record["train"] for record in read_records(run.run / METRICS) if "train" in record)
        for run in runs
    )
    assert first["loss"] == other["loss"], "the forward is the same"
    assert first["grad_norm"] != other["grad_norm"]
    with pytest.raises(ExpertlyError, match=r"E204.*sparsemixer"):
        more = ["router.router=sparsemixer", "router.allow_non_stock=true"]
        loop.run(configure(tmp_path / "no", "router.straight_through=true", *more))
    assert not (tmp_path / "no" / "config.yaml").exists()
