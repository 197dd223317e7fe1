"""One step: what the guard refuses moves nothing at all."""

import math

import pytest
import torch

from expertly.train.guard import Guard
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder

BIASED = [
    "router.router=biased_sigmoid_topk",
    "router.allow_non_stock=true",
    "router.bias_update_rate=0.01",
]


@pytest.fixture
def stepping(configure, tmp_path):
    """stepping(*overrides) -> (config, job, do), where do(step) takes one step."""

    def make(*overrides):
        config = configure(tmp_path / "run", *overrides)
        job = prepare(config, None, lambda line: None)
        recorder = Recorder(job.attachment.rule) if job.attachment else None
        guard = Guard(config.optim)
        return config, job, lambda step: train_step(config, job, recorder, guard, step)

    return make


def everything(job):
    """Weights, selection biases and moments."""
    tensors = [*job.model.parameters(), *(each for each in job.attachment.bias)]
    moments = [value for state in job.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*tensors, *moments)]


@pytest.mark.parametrize(("kind", "code"), [("nan", "E501"), ("inf", "E501")])
def test_a_refused_batch_moves_nothing(kind, code, stepping, monkeypatch):
    monkeypatch.setenv("EXPERTLY_FAULT", f"train.loss@2:{kind}")
    _, job, do = stepping(*BIASED)
    first = do(0)
    assert first.bad is None
    assert all(bias.abs().sum() > 0 for bias in job.attachment.bias)
    before, rows = everything(job), job.batches.drawn
    second = do(1)
    assert second.bad.code == code
    assert not math.isfinite(second.loss)
    assert not math.isfinite(second.grad_norm)
    assert all(map(torch.equal, before, everything(job)))
    assert all(parameter.grad is None for parameter in job.model.parameters())
    assert job.batches.drawn == rows + 4, "it is behind the run"
    assert second.counts is not None, "what was routed is still told"
    third = do(2)
    assert third.bad is None
    assert not all(map(torch.equal, before, everything(job)))


def test_a_spike_is_the_losses_and_the_gradients(stepping, monkeypatch):
    """So that the guard and clipping meet what a real one would bring."""
    _, _, do = stepping("max_grad_norm=0")
    plain = do(0)
    monkeypatch.setenv("EXPERTLY_FAULT", "train.loss@1:spike")
    _, _, do = stepping("max_grad_norm=0")
    spiked = do(0)
    assert spiked.loss == pytest.approx(10 * plain.loss)
    assert spiked.grad_norm == pytest.approx(10 * plain.grad_norm)
    assert spiked.losses == plain.losses, "its parts are told as they were"


def test_batches_are_numbered_by_the_rows_they_are_made_of(stepping, monkeypatch):
    """Not by steps: a run that goes back meets the next one."""
    monkeypatch.setenv("EXPERTLY_FAULT", "train.step@2:error")
    _, job, do = stepping("gradient_accumulation_steps=2", "per_device_train_batch_size=3")
    do(0)
    assert job.batches.drawn == 6
    with pytest.raises(RuntimeError, match=r"injected at train\.step"):
        do(0)
    assert job.batches.drawn == 6


def test_a_dense_model_has_no_router_to_tell_of(stepping):
    done = stepping("model.twin=true")[2](0)
    assert (done.counts, done.health, done.bad) == (None, None, None)
    assert done.learning_rate > 0
