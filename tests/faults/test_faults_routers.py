"""Routers that collapse and experts that fall silent, made so on purpose: in this process."""

import re
from pathlib import Path

import pytest
import torch
from runs import require_nothing_lost, require_same

from expertly.errors import ExpertlyError, Stopped
from expertly.train import loop
from expertly.watch.records import METRICS, ROUTER, read_records

BIASED = ["router.router=biased_sigmoid_topk", "router.allow_non_stock=true"]


@pytest.fixture
def made_sick(monkeypatch):
    """made_sick(spoil): every run from the beginning starts with spoil(job)."""
    real = loop.prepare

    def order(spoil):
        def prepare(config, checkpoint, say):
            job = real(config, checkpoint, say)
            if checkpoint is None:
                with torch.no_grad():
                    spoil(job)
            return job

        monkeypatch.setattr(loop, "prepare", prepare)

    return order


def overcrowd(layer, experts):
    """A selection bias of +10 on some experts, as many as a token is sent to."""

    def spoil(job):
        job.attachment.bias[layer][experts] += 10

    return spoil


def test_b12_a_collapse_is_named_in_time(run_config, made_sick, count, capsys):
    for number in range(count(1, 20)):
        layer, expert = number % 2, number % 8
        made_sick(overcrowd(layer, [expert]))
        more = [*BIASED, "max_steps=50", "save_steps=5000", "eval_steps=5000", f"seed={number}"]
        config = run_config(f"run-{number}", "model.num_experts=8", "top_k=1", *more)
        with pytest.raises(ExpertlyError, match=r"E101.* experts that received no token"):
            loop.run(config)
        run = Path(config.output_dir)
        raised = [each["alarm"] for each in read_records(run / METRICS) if "alarm" in each]
        found = [each for each in raised if each["kind"] == "collapse" and each["layer"] == layer]
        assert found
        assert found[0]["experts"] == [expert]
        assert found[0]["step"] <= 50
        said = capsys.readouterr().err
        assert f"collapse: layer {layer}, expert {expert}: " in said
        assert f"Advice: {found[0]['advice']}" in said


@pytest.fixture
def eight(run_config):
    """eight("name", *overrides): of 8 experts and 40 steps."""
    more = [*BIASED, "model.num_experts=8", "max_steps=40", "save_steps=10", "eval_steps=40"]
    return lambda name, *others: run_config(name, *more, *others)


def test_b12_a_collapse_ends_a_run_that_asks_for_it(eight, made_sick):
    made_sick(overcrowd(1, [2, 5]))
    config = eight("run", "router.on_collapse=stop")
    with pytest.raises(ExpertlyError) as caught:
        loop.run(config)
    assert (caught.value.code, caught.value.exit_code) == ("E503", 5)
    assert re.search(
        r"E503\] step \d+, layer 1, experts 2, 5: .*: router.on_collapse=stop. FIX: go on with "
        "--resume router.on_collapse=rebalance",
        str(caught.value),
    )
    require_nothing_lost(Path(config.output_dir), [10])


def test_b12_a_collapsed_router_recovers_and_a_resumed_one_too(
    eight, made_sick, faults, count, capsys
):
    healthy = loop.run(eight("healthy"))
    made_sick(overcrowd(1, [2, 5]))
    whole = loop.run(eight("whole", "router.on_collapse=rebalance"))
    records = read_records(whole.run / METRICS)
    rebalanced = [each["step"] for each in records if "rebalanced" in each]
    assert len(rebalanced) == 1
    assert rebalanced[0] < 20
    load = [each for each in read_records(whole.run / ROUTER) if "load" in each][-1]["load"][1]
    assert max(load) < 0.4, "the router spreads its tokens again"
    assert abs(whole.loss / healthy.loss - 1) < 0.05
    said = capsys.readouterr().err
    assert f"rebalanced at step {rebalanced[0]}: routers of layers [1] drawn anew" in said
    # cut just before, just behind and long after it
    before, behind = rebalanced[0] - 2, rebalanced[0] + 1
    for number, step in enumerate(count([before, behind], [before, behind, 35])):
        faults(f"train.step@{step}:term")
        config = eight(f"cut-{number}", "router.on_collapse=rebalance")
        with pytest.raises(Stopped):
            loop.run(config)
        faults()
        require_same(loop.run(config, resume=True).run, whole.run)


def test_b12_a_late_collapse_is_overcome_though_the_loss_jumps(
    run_config, made_sick, faults, tmp_path
):
    """The text is learnt by heart, so the guard's window is full, and narrow around nothing; then
    the balance loss that comes with a router drawn anew is a jump, and must be let pass."""
    (tmp_path / "heart.txt").write_text("the cat sees " * 3000)  # none of it twice
    (tmp_path / "held_out.txt").write_text("the cat sees " * 30)
    sources = f"[{{path: {tmp_path}/heart.txt, domain: a}}, "
    sources += f"{{path: {tmp_path}/held_out.txt, domain: a, eval: true}}]"
    more = [*BIASED, "model.num_experts=8", "model.num_hidden_layers=1", "model.expert_dropout=0"]
    more += ["router.jitter=0", f"data.sources={sources}", "data.sequence_length=16"]
    more += ["per_device_train_batch_size=2", "optim.learning_rate=0.01", "max_steps=200"]
    more += ["eval_steps=500", "save_steps=500"]
    made_sick(overcrowd(0, [2, 5]))
    faults("train.step@170:term")
    with pytest.raises(Stopped):  # so far only warned of
        loop.run(run_config("run", *more))
    faults()
    run = loop.run(run_config("run", *more, "router.on_collapse=rebalance"), resume=True).run
    records = read_records(run / METRICS)
    assert [each["step"] for each in records if "rebalanced" in each] == [171]
    assert [each for each in records if "skipped" in each] == []
    losses = {each["step"]: each["train"]["loss"] for each in records if "train" in each}
    before = max(losses[step] for step in range(171 - 128, 171))
    assert min(losses[step] for step in range(172, 201)) > 10 * before, "no jump at all"


def test_b13_an_expert_that_answers_nothing(run_config, made_sick, faults):
    """Frozen at 0, or it would learn to speak again; its load looks even all the while."""

    def mute(job):
        weights = job.attachment.layers[0].experts.down_proj
        weights[1] = 0
        weights.requires_grad_(False)

    def run(name, resume=False):
        return loop.run(run_config(name, "max_steps=30", "save_steps=12"), resume=resume).run

    made_sick(mute)
    whole = run("whole")
    raised = [each["alarm"] for each in read_records(whole / METRICS) if "alarm" in each]
    silent = [each for each in raised if each["kind"] == "silent"]
    assert [(each["layer"], each["experts"]) for each in silent] == [(0, [1])]
    assert silent[0]["step"] <= 50
    norms = [each["norms"] for each in read_records(whole / "router.jsonl") if "norms" in each]
    assert norms[0][0][1] == 0 < norms[0][0][0]


def test_g9_healthy_runs_raise_no_alarm(run_config, count):
    for seed in range(count(1, 20)):
        more = [f"seed={seed}", "max_steps=100", "save_steps=500", "eval_steps=500"]
        run = loop.run(run_config(f"run-{seed}", *more, "log.logging_steps=20")).run
        assert [each["alarm"] for each in read_records(run / METRICS) if "alarm" in each] == []
