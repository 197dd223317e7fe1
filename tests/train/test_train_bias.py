"""Balancing by a bias: once per optimizer step, from the whole batch's counts."""

import pytest
import torch
from train_models import latent_overrides

from expertly.train.evaluate import evaluate
from expertly.train.guard import Guard
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder

RATE = 0.01


@pytest.fixture
def start(configure, tmp_path):
    """start(rows, micro-batches, ...) -> (config, job, recorder) of a tiny DeepSeek-V3."""

    def make(rows: int, parts: int, *more: str):
        config = configure(
            tmp_path / "run",
            *latent_overrides(),
            f"bias_update_rate={RATE}",
            f"per_device_train_batch_size={rows}",
            f"gradient_accumulation_steps={parts}",
            *more,
        )
        job = prepare(config, None, lambda line: None)
        return config, job, Recorder(job.attachment.rule)

    return make


@pytest.mark.parametrize(("rows", "parts"), [(8, 1), (2, 4)])
def test_it_moves_once_per_step_by_the_whole_batchs_counts(start, rows, parts):
    config, job, recorder = start(rows, parts)
    expected = torch.zeros(2, 4)
    for step in range(3):
        counts = train_step(config, job, recorder, Guard(config.optim), step).counts
        assert counts.chosen.sum(dim=-1).tolist() == [8 * 32 * 2] * 2, "the whole batch, once"
        even = counts.chosen.mean(dim=-1, keepdim=True)
        expected += RATE * (even - counts.chosen).sign().float()
        assert torch.allclose(job.attachment.biases(), expected, atol=1e-7)
    assert expected.abs().max() > 0
    buffers = [layer.router.e_score_correction_bias for layer in job.attachment.layers]
    assert torch.equal(torch.stack(buffers), job.attachment.biases()), "the family's own tensor"
    assert buffers[0].dtype == torch.float32


def test_the_split_does_not_change_it(start):
    (one, job_1, recorder_1), (four, job_4, recorder_4) = start(8, 1), start(2, 4)
    first = train_step(one, job_1, recorder_1, Guard(one.optim), 0)
    second = train_step(four, job_4, recorder_4, Guard(four.optim), 0)
    assert torch.equal(first.counts.chosen, second.counts.chosen)
    assert torch.equal(job_1.attachment.biases(), job_4.attachment.biases())
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)


def test_evaluation_does_not_touch_it(start):
    config, job, recorder = start(4, 2)
    train_step(config, job, recorder, Guard(config.optim), 0)
    before = job.attachment.biases().clone()
    evaluate(job.model, job.held_out, job.domains, job.autocast)
    assert torch.equal(job.attachment.biases(), before)
    chosen = train_step(config, job, recorder, Guard(config.optim), 1).counts.chosen
    assert chosen.sum() == 2 * 8 * 32 * 2, "nor is it counted"


def test_without_a_rate_it_stays(start):
    config, job, recorder = start(4, 1, "bias_update_rate=0")
    train_step(config, job, recorder, Guard(config.optim), 0)
    assert job.attachment.biases().abs().sum() == 0
