"""A run that is killed or told to stop, at any moment: nothing that was announced is lost."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from runs import (
    STAGES,
    announced,
    contents,
    hidden,
    place,
    require_nothing_lost,
    require_same,
)

from expertly.config import load
from expertly.errors import Stopped
from expertly.folders import checkpoints
from expertly.train import loop
from expertly.train.config import TrainConfig

LAST = 24  # steps of the run


def newest(run) -> int:
    found = checkpoints(run) if run.is_dir() else []
    return int(found[-1].name.split("-")[1]) if found else 0


def ready(process) -> None:
    """Wait until our own code hears SIGTERM: before that a Python process has no say."""
    while not process.over():
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def strike_at_random(process, run, draw: random.Random, signum: int) -> None:
    """A signal at a moment of the process's whole life, or within a few steps of its training."""
    if signum != signal.SIGKILL:
        ready(process)
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0, place().seconds))
    else:
        process.until(f"\nstep {newest(run) + draw.randint(1, 7)}/{LAST}")
        time.sleep(draw.uniform(0, 0.15))
    process.send(signum)


# --- B1: kill -9 --------------------------------------------------------------------------------


def test_b1_kill_at_every_stage_of_a_save(tmp_path):
    server, config, unbroken, _ = place()
    run, saved = tmp_path / "run", []
    for step, stage in zip((3, 6, 9, 12), STAGES, strict=True):
        name = f"checkpoint-{step}"
        process = server.start(config, run, fault=f"save.{stage}@{name}:kill")
        assert process.code() == -signal.SIGKILL
        saved += announced(process.said())
        require_nothing_lost(run, saved)
        assert step not in saved, "announced before it was durable"
        assert (run / name).exists() == (stage == "renamed")
        left = [] if stage == "renamed" else [f".{name}."]
        # one: what the kill before left is gone
        assert [found[: len(name) + 2] for found in hidden(run)] == left
    process = server.start(config, run)
    assert process.code() == 0, process.said()
    assert saved == [3, 6, 9], "each was gone on from"
    require_same(run, unbroken)


def test_b1_kill_at_random_moments(tmp_path, count):
    server, config, unbroken, _ = place()
    kills, draw, runs, saved = 0, random.Random(1), 0, []
    run = tmp_path / "run-0"
    while kills < count(1, 50):
        process = server.start(config, run, fresh=kills % 10 == 9)
        strike_at_random(process, run, draw, signal.SIGKILL)
        code = process.code()
        saved += announced(process.said())
        if code == 0:  # it was faster: on to another run
            require_same(run, unbroken)
            runs, saved = runs + 1, []
            run = tmp_path / f"run-{runs}"
            continue
        assert code == -signal.SIGKILL, process.said()
        kills += 1
        if run.is_dir():
            require_nothing_lost(run, saved)
    process = server.start(config, run)
    assert process.code() == 0, process.said()
    require_same(run, unbroken)


# --- B6 and B7: told to stop --------------------------------------------------------------------


def test_b6_told_to_stop_during_set_up(tmp_path):
    server, config, _, _ = place()
    run = tmp_path / "run"
    process = server.start(config, run, fresh=True)
    ready(process)
    process.send(signal.SIGTERM)
    assert process.code() == 143, process.said()
    assert process.said().endswith("expertly: stopped\n")
    assert not run.exists(), "nothing was begun, nothing is left"


def test_b6_told_to_stop_at_random_moments(tmp_path, count):
    server, config, unbroken, _ = place()
    stops, runs, draw = 0, 0, random.Random(2)
    run = tmp_path / "run-0"
    while stops < count(1, 20):
        process = server.start(config, run)
        before = newest(run)
        strike_at_random(process, run, draw, signal.SIGTERM)
        told = time.monotonic()
        code = process.code()
        assert time.monotonic() - told < 30
        if code == 0:
            require_same(run, unbroken)
            runs += 1
            run = tmp_path / f"run-{runs}"
            continue
        said = process.said()
        assert code == 143, said
        assert said.endswith(
            "expertly: --resume goes on from the newest checkpoint\nexpertly: stopped\n"
        )
        stops += 1
        if run.exists():
            require_nothing_lost(run, announced(said))
            assert hidden(run) == []
            steps = [int(step) for step in re.findall(rf"^step (\d+)/{LAST}", said, re.MULTILINE)]
            assert newest(run) == (steps[-1] if steps else before), "the last step was saved"
    process = server.start(config, run)
    assert process.code() == 0, process.said()
    require_same(run, unbroken)


@pytest.fixture
def here(tmp_path):
    """here(*overrides) -> the config of a run in this process."""
    return lambda *more: load(
        TrainConfig, place().config, [f"output_dir={tmp_path / 'run'}", *more]
    )


@pytest.mark.parametrize("step", [0, 6, LAST])
def test_b6_told_to_stop_during_an_evaluation(step, here, monkeypatch):
    """It writes no figure of a part of the text, and the resumed run makes up for it."""
    real, seen = loop.evaluate, []

    def evaluate(model, batches, *rest):
        def until_told():
            for batch in batches:
                if len(seen) == min(step, LAST) // 6 and signal.SIGTERM not in seen:
                    os.kill(os.getpid(), signal.SIGTERM)
                    seen.append(signal.SIGTERM)
                yield batch

        held_out = real(model, until_told(), *rest)
        seen.append(step)
        return held_out

    config = here()
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(loop, "evaluate", evaluate)
        loop.run(config)
    assert stopped.value.signum == signal.SIGTERM
    run = Path(config.output_dir)
    assert newest(run) == step
    assert not loop.evaluated(run, step)
    loop.run(config, resume=True)
    require_same(run, place().unbroken)


def test_b6_told_to_stop_while_a_finished_run_is_evaluated_once_more(here, monkeypatch):
    """Its receipt is not written anew with the loss of a part of the text."""
    config = here("max_steps=2")
    run = loop.run(config).run
    receipt = (run / "receipt.json").read_bytes()
    real = loop.evaluate

    def evaluate(model, batches, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batches, *rest)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Stopped):
        loop.run(config, resume=True)
    assert (run / "receipt.json").read_bytes() == receipt


def test_b6_told_to_stop_in_the_step_that_goes_back(here, monkeypatch):
    """Going back does not forget the signal."""
    more = ("max_steps=9", "optim.on_bad_step=roll_back")
    monkeypatch.setenv("EXPERTLY_FAULT", "train.step@5:term,train.loss@5:nan")
    with pytest.raises(Stopped):
        loop.run(here(*more))
    run = Path(here().output_dir)
    assert newest(run) == 3
    monkeypatch.setenv("EXPERTLY_FAULT", "train.loss@5:nan")
    assert loop.run(here(*more), resume=True).steps == 9


def test_b7_the_second_signal_ends_a_save_at_once(tmp_path, count):
    for signum in count([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]):
        require_the_second_signal_to_end_a_save(signum, tmp_path / signum.name)


def require_the_second_signal_to_end_a_save(signum, run):
    """The first one comes as the save of step 6 begins, the other 50 ms later."""
    server, config, _, _ = place()
    # large enough for a save of some 200 ms
    large = ["model.hidden_size=256", "model.moe_intermediate_size=512", "model.num_experts=8"]
    large += ["max_steps=7", "sequence_length=8", "log.save_steps=3"]
    process = server.start(config, run, *large, fault="save.begun@checkpoint-6:term")
    process.until("saved step 3: ")
    while not [name for name in hidden(run) if name.startswith(".checkpoint-6.")]:
        assert not process.over(), process.said()
        time.sleep(0.001)
    time.sleep(0.05)
    process.send(signum)
    assert process.code() == 128 + signum, process.said()
    said = process.said()
    assert announced(said) == [3], "it was not let finish"
    assert said.endswith("expertly: stopped\n")
    require_nothing_lost(run, [3])
    assert hidden(run) == []
    old = contents(run / "checkpoint-3")
    process = server.start(config, run, *large)
    assert process.code() == 0, process.said()
    assert contents(run / "checkpoint-3") == old
    require_nothing_lost(run, [3, 6, 7])


# --- B19: two at once ---------------------------------------------------------------------------


def test_b19_a_folder_has_one_run_at_a_time(tmp_path):
    server, config, _, _ = place()
    run, long = tmp_path / "run", ["max_steps=5000", "log.save_steps=5000"]
    first = server.start(config, run, *long)
    first.until("\nstep 1/")
    second = server.start(config, run, *long)
    assert second.code() == 2
    line = (
        rf"expertly: error\[E210\] {run}: in use by pid {first.pid} on [^\n]+\. FIX: wait [^\n]+\n"
    )
    assert re.fullmatch(line, second.said()), second.said()
    assert not first.over()
    first.send(signal.SIGKILL)
    assert first.code() == -signal.SIGKILL
    third = server.start(config, run, *long)
    third.until("\nstep 1/")
    third.send(signal.SIGTERM)
    assert third.code() == 143, third.said()
    require_nothing_lost(run, announced(third.said()))
    assert len(announced(third.said())) == 1
