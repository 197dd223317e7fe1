"""What is written down of a step: numbers that add up, and JSON that can hold them."""

import json
import math

import pytest
import torch

from expertly.train.checkpoint import Progress
from expertly.train.evaluate import HeldOut
from expertly.train.guard import Guard
from expertly.train.report import status, write_evaluation, write_step
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder
from expertly.watch.records import finite

BEFORE = Progress(step=2, tokens=100, seconds=1.0, data={})
AT = Progress(step=4, tokens=300, seconds=3.0, data={})


class Log:
    """Keeps the records."""

    def __init__(self):
        self.told, self.routed = [], []

    def metrics(self, record):
        self.told.append(record)

    def router(self, record):
        self.routed.append(record)


@pytest.fixture
def step(configure, tmp_path):
    """step(*overrides) -> the first step of a run."""

    def make(*overrides):
        config = configure(tmp_path / "run", *overrides)
        job = prepare(config, None, lambda line: None)
        recorder = Recorder(job.attachment.rule) if job.attachment else None
        return train_step(config, job, recorder, Guard(config.optim), 0)

    return make


def test_a_step(step):
    log, done = Log(), step()
    norms = torch.tensor([[1.0, 2.0, math.nan, 0.0]] * 2)
    write_step(log, AT, BEFORE, done, norms)
    told, routed = log.told[0], log.routed[0]
    assert (told["step"], told["tokens"], told["seconds"]) == (4, 300, 3.0)
    assert told["train"]["tokens_per_second"] == 100, "since the report before"
    assert told["train"]["loss"] == done.loss
    assert told["moe"] == done.health
    for name in ("load", "mass"):
        assert [sum(row) for row in routed[name]] == pytest.approx([1, 1], abs=1e-4)
        assert [len(row) for row in routed[name]] == [4, 4]
    assert all(len(values) == 2 for values in routed["layers"].values())
    assert json.loads(json.dumps(finite(routed)))["norms"] == [[1.0, 2.0, None, 0.0]] * 2
    log = Log()
    write_step(log, AT, BEFORE, done, None)
    assert "norms" not in log.routed[0]


def test_a_dense_models_step(step):
    log, done = Log(), step("model.twin=true")
    write_step(log, AT, AT, done, None)
    assert log.routed == []
    assert "moe" not in log.told[0]
    assert math.isfinite(log.told[0]["train"]["tokens_per_second"]), "though no time has passed"


def test_an_evaluation():
    log, cosines = Log(), {"to_each_other": [0.5, 1.0]}
    loads = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.zeros(1, 2)}
    write_evaluation(log, AT, HeldOut(2.5, {"a": 2.0, "b": 3.0}, loads), cosines)
    assert log.told[0]["eval"] == {"loss": 2.5, "domain": {"a": 2.0, "b": 3.0}}
    assert log.told[0]["divergence"] == {"to_each_other": 0.75}
    assert log.routed[0]["divergence"] == cosines
    assert log.routed[0]["domains"] == {"a": [[0.75, 0.25]], "b": [[0.0, 0.0]]}
    write_evaluation(log, AT, HeldOut(2.5, {"a": 2.0}, {}), {})
    assert len(log.routed) == 1, "a dense model has none"
    assert "divergence" not in log.told[1]


def test_one_line_for_people(step):
    done = step()
    line = status(done, AT)
    assert line.startswith(f"loss {done.losses.cross_entropy:.3f}  100 tok/s  load max ")
    assert "load" not in status(step("model.twin=true"), AT)
