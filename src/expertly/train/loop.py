"""The training loop: read it from top to bottom. Its parts lie beside it, one idea a file."""

import gc
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from expertly.config import dump
from expertly.errors import ExpertlyError, Stopped
from expertly.folders import save_file
from expertly.lock import locked
from expertly.receipts import require
from expertly.train.checkpoint import (
    Progress,
    checkpoint_at,
    read_alarms,
    read_progress,
    restore,
    save_checkpoint,
    whole_checkpoint,
)
from expertly.train.config import TrainConfig
from expertly.train.divergence import Divergence
from expertly.train.evaluate import HeldOut, evaluate
from expertly.train.freeze import thawed
from expertly.train.guard import GoBack, Guard, refuse
from expertly.train.health import Health
from expertly.train.log import RunLog
from expertly.train.proof import Proof, write_receipt
from expertly.train.rebalance import Remedy
from expertly.train.report import status, write_evaluation, write_step
from expertly.train.setup import Job, prepare
from expertly.train.start import CONFIG, enough_memory, find_start
from expertly.train.stop import Stop
from expertly.train.text import Data
from expertly.train.update import Step, train_step
from expertly.watch.records import evaluated, last_health

_MISSES = 3  # saves that the disk refuses, one after another, before a run ends


class Run(NamedTuple):
    """What a run works with, besides where it stands."""

    config: TrainConfig
    job: Job
    proof: Proof
    guard: Guard
    health: Health | None  # None: a dense model
    divergence: Divergence | None  # None: a dense model, or adapters
    log: RunLog
    stop: Stop


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


class Ended(NamedTuple):
    """How a run ended, and what it read."""

    result: TrainResult
    data: Data


def run(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train, and return how it ended; everything lies in config.output_dir.

    Raises what run_to_end does.
    """
    return run_to_end(config, resume=resume).result


def run_to_end(config: TrainConfig, *, resume: bool = False) -> Ended:
    """Train, and return how it ended with the data that it read.

    Raises E205 for a folder in the way, E206 for a changed config, E210 for one in use, E211 for
    one that cannot be written, E401 and E402 when disk or memory end, E501 to E503 when training
    is beyond repair, E101 when the receipt says no, Stopped after a signal, and what reading
    config, data and model can raise.
    """
    folder = Path(config.output_dir)
    with locked(folder), enough_memory(config):
        board = "tensorboard" in config.log.report_to
        log = RunLog(folder, tensorboard=board)
        try:
            checkpoint = find_start(folder, config, log.say, resume=resume)
            ended = _from(checkpoint, config, log)
            while isinstance(ended, GoBack):
                gc.collect()  # hooks tie a model into cycles, and two models may not fit
                ended = _from(whole_checkpoint(folder, log.say), config, log, ended)
        finally:
            log.close()
    return ended


def _from(
    checkpoint: Path | None, config: TrainConfig, log: RunLog, back: GoBack | None = None
) -> Ended | GoBack:
    """Train from a checkpoint, or from the beginning, to the end or to where it must go back."""
    folder = Path(config.output_dir)
    at = read_progress(checkpoint) if checkpoint else None
    remedy = Remedy(**at.remedy) if at else Remedy()
    asked, job = config, prepare(config, checkpoint, log.say)
    config = job.config
    proof, guard = Proof(job.attachment, job.freeze), Guard(config.optim, at.guard if at else {})
    health = Health(job, config, remedy) if job.attachment else None
    diverging = None
    if job.attachment and not job.adapted:  # beside adapters experts stay as they are
        diverging = Divergence(job.attachment, config.model.path, log.say)
    if checkpoint is not None and at is not None:
        job.batches.restore(at.data)
        restore(checkpoint, job, proof)
        seen = read_alarms(checkpoint)
        if health is not None and seen:  # a checkpoint from before there were alarms has none
            health.alarms.restore(seen)
    # only now, so that a config that had to be corrected finds the folder free
    save_file(folder / CONFIG, dump(asked))
    log.begin(at.step if at else None, config.schedule.max_steps)
    if back is not None:
        guard = back.guard(config.optim, guard.state())
        job.batches.restore(back.data)
        for record in back.records:
            log.metrics({"step": 1 + (at.step if at else 0), "rolled_back": record})
    at = at or Progress(step=0, tokens=0, seconds=0.0, data={})
    with Stop() as stop:
        ended = _loop(Run(config, job, proof, guard, health, diverging, log, stop), at)
    if isinstance(ended, GoBack):
        return ended
    held_out = HeldOut(ended.loss, ended.domains, {})
    receipt = write_receipt(folder, ended.checkpoint, asked, job, proof, held_out)
    require(receipt, folder)
    return Ended(ended, job.data)


def _loop(run: Run, at: Progress) -> TrainResult | GoBack:
    """Step; once in a while report, evaluate and save."""
    config, log, last = run.config, run.log, run.config.schedule.max_steps
    window, misses, done = at, 0, None
    held_out = _evaluate_first(run, at)
    while at.step < last and not run.stop.asked:
        done, at, back = _step(run, at)
        if back is not None:
            if run.stop.asked:  # nothing to save: a resumed run meets the same batch, and goes back
                raise Stopped(run.stop.signum)
            return back

        # Once in a while: report, evaluate, save; and always at the end.
        report_due = _due(at.step, config.log.logging_steps, last)
        if report_due:
            write_step(log, at, window, done, run.health.alarms.norms if run.health else None)
            window = at
        log.advance(at.step, status(done, at), due=report_due)
        if _due(at.step, config.eval.eval_steps, last):
            held_out = _evaluate(run, at)
        if _due(at.step, config.log.save_steps, last) and not run.stop.asked:
            misses = _save(run, at, misses)
    if run.stop.asked:
        _end(run, at)
    return _result(run, at, done, held_out)


def _step(run: Run, at: Progress) -> tuple[Step, Progress, GoBack | None]:
    """One optimizer step, where the run then stands, and what its numbers call for."""
    config, health = run.config, run.health
    recorder = None
    if health is not None:
        health.look(at.step)
        config = replace(config, router=health.remedy.router(config.router))
        recorder = health.recorder
    if begins := thawed(at.step, config.optim.freeze):
        run.log.say(begins)
    started = time.perf_counter()
    done = train_step(config, run.job, recorder, run.guard, at.step)
    after = Progress(
        step=at.step + 1,
        tokens=at.tokens + config.schedule.rows_per_step * config.data.sequence_length,
        seconds=at.seconds + time.perf_counter() - started,
        data=run.job.batches.state(),
    )
    if done.bad is not None:
        return done, after, refuse(config.optim, run.guard, run.log, at, after, done.bad)
    if health is not None and done.counts is not None:
        run.proof.add(done.counts, moving=run.job.freeze.experts_move(at.step))
        if health.heed(after.step, done.counts, run.log):
            run.guard.forget()
    return done, after, None


def _result(run: Run, at: Progress, done: Step | None, held_out: HeldOut | None) -> TrainResult:
    folder = Path(run.config.output_dir)
    if held_out is None:  # it was done already, and has written this evaluation down
        held_out = _held_out(run)
        if run.stop.asked:  # of a part of the text
            raise Stopped(run.stop.signum)
    return TrainResult(
        run=folder,
        checkpoint=checkpoint_at(folder, at.step),
        steps=at.step,
        tokens=at.tokens,
        seconds=at.seconds,
        loss=held_out.loss,
        domains=held_out.domains,
        router=done.health if done else last_health(folder),
    )


def _save(run: Run, at: Progress, misses: int) -> int:
    """Save a checkpoint; returns how many the disk has refused one after another.

    A refused one is not the end: the next may fit, and what was saved before is kept. Raises E401
    for the third, and for the last of the run.
    """
    folder = Path(run.config.output_dir)
    remedy = asdict(run.health.remedy) if run.health else {}
    alarms = run.health.alarms.state() if run.health else {}
    at = at._replace(guard=run.guard.state(), remedy=remedy)
    try:
        saved = save_checkpoint(folder, run.job, run.proof, at, alarms)
    except ExpertlyError as error:
        ends = run.stop.asked or at.step == run.config.schedule.max_steps
        if error.code != "E401" or ends or misses + 1 == _MISSES:
            raise
        run.log.say(f"warning: not saved: {error}. Training goes on, the next save may fit")
        return misses + 1
    run.guard.saved()
    run.log.say(f"saved step {at.step}: {saved}")
    return 0


def _end(run: Run, at: Progress) -> None:
    """Save where the run stands, and raise Stopped."""
    if at.step and not checkpoint_at(Path(run.config.output_dir), at.step).exists():
        _save(run, at, 0)
    raise Stopped(run.stop.signum)


def _evaluate_first(run: Run, at: Progress) -> HeldOut | None:
    """The evaluation of the step that a run begins at, where one is due and was not reached."""
    done = evaluated(Path(run.config.output_dir), at.step)
    due = _due(at.step, run.config.eval.eval_steps, run.config.schedule.max_steps)
    return _evaluate(run, at) if due and not done else None


def _evaluate(run: Run, at: Progress) -> HeldOut | None:
    """Evaluate and write it down; None, and nothing written, when asked to stop meanwhile."""
    held_out = _held_out(run)
    if run.stop.asked:
        return None
    cosines = run.divergence.measure() if run.divergence else {}
    write_evaluation(run.log, at, held_out, cosines)
    return held_out


def _held_out(run: Run) -> HeldOut:
    job = run.job
    batches = run.stop.until(job.held_out)
    return evaluate(job.model, batches, job.domains, job.autocast, job.attachment)


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
