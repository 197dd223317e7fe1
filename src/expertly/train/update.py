"""One optimizer step: gradient of the whole batch, guard, clip, update, then move the biases."""

from typing import Any, NamedTuple

import torch

from expertly.faults import factor, strike
from expertly.models.attach import Attachment
from expertly.models.loading import Model
from expertly.moe.balance import update_bias
from expertly.scale.reduce import sum_over_ranks
from expertly.train.config import TrainConfig
from expertly.train.evaluate import to_micro
from expertly.train.guard import Guard, Verdict
from expertly.train.optimizer import clip, set_learning_rate
from expertly.train.schedule import lr_factor
from expertly.train.setup import Job
from expertly.train.step import StepLosses, accumulate, total_loss
from expertly.watch.recorder import Recorder
from expertly.watch.stats import LayerCounts, watch_set


class Step(NamedTuple):
    """What one optimizer step did."""

    losses: StepLosses
    loss: float  # the one that was differentiated
    grad_norm: float  # before clipping
    learning_rate: float
    bad: Verdict | None  # why no weight was moved; None: they were
    counts: LayerCounts | None  # of its routers; None for a dense model
    health: dict[str, Any] | None  # the watch set; None for a dense model


def train_step(
    config: TrainConfig, job: Job, recorder: Recorder | None, guard: Guard, step: int
) -> Step:
    """The step after `step` others. A batch that the guard refuses moves nothing."""
    job.freeze.at(step)
    rate = lr_factor(step, config.schedule)
    set_learning_rate(job.optimizer, rate)
    size, device = config.schedule.gradient_accumulation_steps, job.model.device
    number = 1 + job.batches.drawn // config.schedule.rows_per_step
    strike("train.step", number)
    batch = [to_micro(next(job.batches), device) for _ in range(size)]
    losses = accumulate(job.model, job.attachment, batch, config.router, recorder, job.autocast)
    injected = factor("train.loss", number)
    if injected != 1:
        _scale(job.model, injected)
    loss = injected * total_loss(*losses, router=config.router)
    norm = clip(job.model, config.optim.max_grad_norm)
    bad = guard.judge(loss, norm)
    if bad is None:
        job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    rate *= config.optim.learning_rate
    if job.attachment is None or recorder is None:
        return Step(losses, loss, norm, rate, bad, None, None)
    counts = recorder.read(sum_over_ranks)
    if config.router.bias_update_rate and bad is None:
        _move_biases(job.attachment, counts, config.router.bias_update_rate)
    health = watch_set(counts, job.attachment.biases())
    return Step(losses, loss, norm, rate, bad, counts, health)


@torch.no_grad()
def _scale(model: Model, by: float) -> None:
    """Gradients as a loss that is `by` times as large would have left them."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(by)


def _move_biases(attachment: Attachment, counts: LayerCounts, rate: float) -> None:
    for bias, chosen in zip(attachment.bias, counts.chosen, strict=True):
        if bias is not None:
            update_bias(bias, chosen, rate)
