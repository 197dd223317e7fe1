"""The training loop: read it from top to bottom. Its parts lie beside it, one idea a file."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expertly.config import differences, dump, load
from expertly.errors import ExpertlyError
from expertly.folders import save_file
from expertly.models.attach import Attachment
from expertly.moe.balance import update_bias
from expertly.receipts import require
from expertly.train.checkpoint import (
    Progress,
    latest_checkpoint,
    read_progress,
    restore,
    save_checkpoint,
    verified_checkpoint,
)
from expertly.train.config import TrainConfig
from expertly.train.evaluate import HeldOut, evaluate, to_micro
from expertly.train.log import RunLog, board_writer, say_to_stderr
from expertly.train.optimizer import clip, set_learning_rate
from expertly.train.proof import Proof, write_receipt
from expertly.train.schedule import lr_factor
from expertly.train.setup import Job, prepare
from expertly.train.step import StepLosses, accumulate, total_loss
from expertly.watch.recorder import Recorder
from expertly.watch.records import METRICS, forget_after, last_health
from expertly.watch.stats import LayerCounts, watch_set

CONFIG = "config.yaml"
# what may change between a run and its resumption
_FREE = ("log.", "output_dir:", "device:", "data.cache_dir:")


class Step(NamedTuple):
    """What one optimizer step did."""

    losses: StepLosses
    loss: float  # the one that was differentiated
    grad_norm: float  # before clipping
    learning_rate: float
    counts: LayerCounts | None  # of its routers; None for a dense model
    health: dict[str, Any] | None  # the watch set; None for a dense model


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    run: Path
    checkpoint: Path
    steps: int
    tokens: int
    seconds: float  # of training, without evaluation and saving
    loss: float  # held-out, over all domains
    domains: dict[str, float]
    router: dict[str, Any] | None  # the last watch set; None for a dense model


def run(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train, and return how it ended; everything lies in config.output_dir.

    Raises E205 for a folder in the way or nothing to resume, E206 for a changed config, E501 when
    the loss is no longer a number, E101 when the receipt says no, and what reading config, data
    and model can raise.
    """
    folder = Path(config.output_dir)
    checkpoint = find_start(folder, config, resume=resume)
    board = "tensorboard" in config.log.report_to
    if board:
        board_writer()  # a missing package is found now, not after the data was read
    job = prepare(config, checkpoint, say_to_stderr)
    proof = Proof(job.attachment)
    at = Progress(step=0, tokens=0, seconds=0.0, data=job.batches.state())
    if checkpoint is not None:
        at = read_progress(checkpoint)
        job.batches.restore(at.data)
        restore(checkpoint, job, proof)
    # only now, so that a config that had to be corrected finds the folder free
    save_file(folder / CONFIG, dump(config))
    forget_after(folder, at.step if checkpoint else -1)
    log = RunLog(folder, max_steps=config.schedule.max_steps, at=at.step, tensorboard=board)
    try:
        result = _loop(config, job, at, log, proof)
        receipt = write_receipt(
            folder, result.checkpoint, config, job, proof, HeldOut(result.loss, result.domains)
        )
    finally:
        log.close()
    require(receipt, folder)
    return result


def find_start(folder: Path, config: TrainConfig, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None: from the beginning. Nothing is written yet.

    A run that was stopped before its first checkpoint starts again from the beginning.
    """
    there = (folder / CONFIG).exists()
    if resume and not there:
        fix = "leave out --resume to start it"
        raise ExpertlyError("E205", str(folder), "holds no run to resume", fix=fix)
    if resume:
        _refuse_changes(folder, config)
        return verified_checkpoint(folder)
    if there or (folder / METRICS).exists() or latest_checkpoint(folder):
        fix = "add --resume to go on with it, or name another output_dir"
        raise ExpertlyError("E205", str(folder), "holds a run already", fix=fix)
    return None


def _loop(config: TrainConfig, job: Job, at: Progress, log: RunLog, proof: Proof) -> TrainResult:
    """Step; once in a while report, evaluate and save."""
    last, run_folder = config.schedule.max_steps, Path(config.output_dir)
    recorder = Recorder(job.attachment.rule) if job.attachment else None
    window = at
    held_out = _evaluate(job, log, at) if at.step == 0 else None
    checkpoint, health = run_folder / f"checkpoint-{at.step}", last_health(run_folder)
    while at.step < last:
        started = time.perf_counter()
        done = train_step(config, job, recorder, at.step)
        at = Progress(
            step=at.step + 1,
            tokens=at.tokens + _tokens_per_step(config),
            seconds=at.seconds + time.perf_counter() - started,
            data=job.batches.state(),
        )
        proof.add(done.counts)

        # Once in a while: report, evaluate, save; and always at the end.
        report_due = _due(at.step, config.log.logging_steps, last)
        if report_due:
            _report(log, at, window, done)
            window = at
        health = done.health
        log.advance(at.step, _status(done, at), due=report_due)
        if _due(at.step, config.eval.eval_steps, last):
            held_out = _evaluate(job, log, at)
        if _due(at.step, config.log.save_steps, last):
            checkpoint = save_checkpoint(run_folder, job, proof, at)
            log.say(f"saved step {at.step}: {checkpoint}")
    if held_out is None:  # it was done already, and has written this evaluation down
        held_out = evaluate(job.model, job.held_out, job.domains, job.autocast)
    return TrainResult(
        run=run_folder,
        checkpoint=checkpoint,
        steps=at.step,
        tokens=at.tokens,
        seconds=at.seconds,
        loss=held_out.loss,
        domains=held_out.domains,
        router=health,
    )


def train_step(config: TrainConfig, job: Job, recorder: Recorder | None, step: int) -> Step:
    """One optimizer step: gradient of the whole batch, clip, update, then move the biases."""
    factor = lr_factor(step, config.schedule)
    set_learning_rate(job.optimizer, factor)
    device = job.model.device
    size = config.schedule.gradient_accumulation_steps
    batch = [to_micro(next(job.batches), device) for _ in range(size)]
    losses = accumulate(job.model, job.attachment, batch, config.router, recorder, job.autocast)
    loss = total_loss(*losses, router=config.router)
    norm = clip(job.model, config.optim.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        why = f"loss {loss}, gradient norm {norm} at step {step + 1}; no update was made"
        fix = "start a new run with a lower optim.learning_rate"
        raise ExpertlyError("E501", config.output_dir, why, fix=fix)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    rate = factor * config.optim.learning_rate
    if job.attachment is None or recorder is None:
        return Step(losses, loss, norm, rate, None, None)
    counts = recorder.read()
    if config.router.bias_update_rate:
        _move_biases(job.attachment, counts, config.router.bias_update_rate)
    return Step(losses, loss, norm, rate, counts, watch_set(counts, job.attachment.biases()))


def _move_biases(attachment: Attachment, counts: LayerCounts, rate: float) -> None:
    for bias, chosen in zip(attachment.bias, counts.chosen, strict=True):
        if bias is not None:
            update_bias(bias, chosen, rate)


def _report(log: RunLog, at: Progress, window: Progress, done: Step) -> None:
    """Write the last step's numbers down."""
    speed = (at.tokens - window.tokens) / max(at.seconds - window.seconds, 1e-9)
    where = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
    train = {
        "loss": done.loss,
        **done.losses._asdict(),
        "grad_norm": done.grad_norm,
        "learning_rate": done.learning_rate,
        "tokens_per_second": speed,
    }
    if done.counts is None:
        log.metrics({**where, "train": train})
        return
    log.metrics({**where, "train": train, "moe": done.health})
    share = done.counts.load / done.counts.load.sum(dim=-1, keepdim=True).clamp(min=1)
    log.router({**where, "load": [[round(v, 5) for v in row] for row in share.tolist()]})


def _evaluate(job: Job, log: RunLog, at: Progress) -> HeldOut:
    held_out = evaluate(job.model, job.held_out, job.domains, job.autocast)
    where = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
    log.metrics({**where, "eval": {"loss": held_out.loss, "domain": held_out.domains}})
    return held_out


def _status(done: Step, at: Progress) -> str:
    speed = at.tokens / max(at.seconds, 1e-9)
    status = f"loss {done.losses.cross_entropy:.3f}  {speed:,.0f} tok/s"
    if done.health is None:
        return status
    dead, hottest = done.health["dead_frac"], done.health["max_load_ratio"]
    return f"{status}  load max {hottest:.1f}x  dead {dead:.0%}"


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _tokens_per_step(config: TrainConfig) -> int:
    rows = config.schedule.per_device_train_batch_size
    return rows * config.schedule.gradient_accumulation_steps * config.data.sequence_length


def _refuse_changes(folder: Path, config: TrainConfig) -> None:
    """Raises E206 when a resumed run would no longer be the same run."""
    found = differences(load(TrainConfig, folder / CONFIG), config)
    changed = [line for line in found if not line.startswith(_FREE)]
    if changed:
        fix = "resume with the run's own config.yaml, or start a new run"
        raise ExpertlyError("E206", str(folder), "; ".join(changed), fix=fix)
