"""The routers' health in a run: when it looks, what it says, what it does about a collapse."""

from dataclasses import replace

import pytest
import torch
from train_models import Log

from expertly.errors import ExpertlyError
from expertly.train.health import Health
from expertly.train.rebalance import Remedy
from expertly.train.setup import prepare
from expertly.watch.stats import LayerCounts


@pytest.fixture
def health(configure, tmp_path):
    """health(on_collapse, remedy) -> (job, Health, Log)."""

    def make(on_collapse="warn", remedy=None):
        config = configure(tmp_path / "run", f"router.on_collapse={on_collapse}")
        job = prepare(config, None, lambda line: None)
        return job, Health(job, config, remedy or Remedy()), Log()

    return make


def counts(share):
    """A step's counts of 1,000 tokens: layer 0 even, layer 1 with these shares of 2,000."""
    load = torch.tensor([[0.25] * 4, share], dtype=torch.float64) * 2000
    per_layer = torch.full((2,), 500.0, dtype=torch.float64)
    tokens = torch.full((2,), 1000.0, dtype=torch.float64)
    return LayerCounts(load, load, load / 2, per_layer, per_layer, load / 2, tokens)


EVEN, CROWDED = [0.25] * 4, [0.5, 0.5, 0.0, 0.0]


def test_every_tenth_step_is_looked_at(health):
    job, watch, log = health()
    ids = torch.randint(0, 250, (2, 16))
    measured, last = [], None
    for step in range(20):
        watch.look(step)
        with torch.no_grad():
            job.attachment.layers[0].experts.down_proj *= 1.01
        job.model(ids)
        watch.heed(step + 1, counts(EVEN), log)
        if watch.alarms.norms is not None and (
            last is None or not torch.equal(watch.alarms.norms, last)
        ):
            measured.append(step + 1)
            last = watch.alarms.norms
    assert measured == [10, 20]
    assert last.shape == (2, 4)
    assert log.lines == log.records == []


def test_a_look_in_a_refused_step_is_nobody_elses(health):
    job, watch, log = health()
    ids = torch.randint(0, 250, (2, 16))
    watch.look(9)
    job.model(ids)  # measured, and then refused: heed() is not called
    watch.look(10)
    job.model(ids)
    watch.heed(11, counts(EVEN), log)
    assert watch.alarms.norms is None
    watch.look(19)
    job.model(ids)
    watch.heed(20, counts(EVEN), log)
    assert watch.alarms.norms is not None


def collapse(watch, log, steps=60):
    for step in range(1, steps):
        watch.heed(step, counts(CROWDED), log)


def test_warned_of_once_and_of_its_end(health):
    _, watch, log = health()
    collapse(watch, log)
    raised = [each["alarm"] for each in log.records if "alarm" in each]
    assert [(each["kind"], each["layer"]) for each in raised].count(("collapse", 1)) == 1
    assert all(each["layer"] == 1 for each in raised)
    assert any(line.startswith("alarm at step ") and "Advice: " in line for line in log.lines)
    for step in range(60, 120):
        watch.heed(step, counts(EVEN), log)
    cleared = [each["cleared"] for each in log.records if "cleared" in each]
    assert {"kind": "collapse", "layer": 1} in cleared
    assert any("alarm cleared at step" in line for line in log.lines)


def test_stopped(health):
    _, watch, log = health("stop")
    with pytest.raises(
        ExpertlyError, match=r"E503\] step \d+, layer 1, experts 0, 1.*=stop"
    ) as told:
        collapse(watch, log)
    assert told.value.exit_code == 5
    assert "alarm" in log.records[0], "the alarm is on record first"


def test_rebalanced_with_a_remedy_that_lasts(health):
    job, watch, log = health("rebalance")
    routers = [layer.router.weight.detach().clone() for layer in job.attachment.layers]
    collapse(watch, log, 20)
    now = [layer.router.weight for layer in job.attachment.layers]
    assert torch.equal(now[0], routers[0]), "the healthy one is left alone"
    assert not torch.equal(now[1], routers[1])
    assert {"layers": [1]} in [each.get("rebalanced") for each in log.records]
    assert watch.remedy.times == 1
    assert (
        min(group["base_lr"] for group in job.optimizer.param_groups) == watch.remedy.router_lr_cap
    )
    assert not [each for each in watch.alarms.open if each.layer == 1]


def test_after_three_rebalancings_it_is_beyond_help(health):
    _, watch, log = health("rebalance", replace(Remedy(), times=3))
    with pytest.raises(ExpertlyError, match=r"E503.*again after 3 rebalancings"):
        collapse(watch, log)
