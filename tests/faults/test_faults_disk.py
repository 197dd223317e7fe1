"""Disks that are full, read-only or short of inodes; logs and readers that are gone.

Real file systems in memory. Where this user may not mount one, these tests are skipped, and fail
under --stress; faults by injection run everywhere.
"""

import random
import subprocess
import time
from pathlib import Path

import pytest
from runs import (
    announced,
    contents,
    hidden,
    place,
    require_nothing_lost,
    require_same,
    told,
)

from expertly.config import load
from expertly.errors import ExpertlyError
from expertly.folders import checkpoints
from expertly.train import loop
from expertly.train.config import TrainConfig
from expertly.watch.records import METRICS, ROUTER

PAGE = 4096
RECORDS = 10 * PAGE  # room for what a run has written before its second checkpoint


@pytest.fixture
def disk(tmp_path, request):
    """disk("size=1m,nr_inodes=30") -> a small disk's folder; once more: with other options."""
    folder = tmp_path / "disk"

    def mount(options: str) -> Path:
        options = f"remount,{options}" if folder.exists() else options
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            missing = f"no small disk without the right to mount (unshare -Urm): {done.stderr}"
            must = request.config.getoption("--stress")
            return pytest.fail(missing) if must else pytest.skip(missing)
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def room_of(checkpoint: Path) -> int:
    """The bytes that a checkpoint takes on such a disk."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


# --- B2: a full disk ----------------------------------------------------------------------------


def test_b2_a_disk_that_fills_up_in_a_save(disk, count):
    """At any byte of it. The checkpoint before is kept, and training goes on for two saves more."""
    server, config, unbroken, _ = place()
    first = room_of(unbroken / "checkpoint-3")
    offsets, draw = count(1, 20), random.Random(3)
    for number in range(offsets):
        offset = int((number + draw.random()) / offsets * (first - RECORDS)) // PAGE * PAGE
        run = disk(f"size={first + RECORDS + offset}") / f"run-{number}"
        process = server.start(config, run, resume=False)
        assert process.code() == 4, process.said()
        said = process.said()
        assert announced(said) == [3], f"offset {offset}"
        for step in (6, 9):
            line = f"warning: not saved: error[E401] {run}/checkpoint-{step}: disk full: need "
            assert said.count(line) == 1
        assert said.count("Training goes on, the next save may fit") == 2
        last = said.splitlines()[-1]
        assert last.startswith(f"expertly: error[E401] {run}/checkpoint-12: disk full: need ")
        assert " kB, have " in last
        assert last.endswith("FIX: free space or name another output folder")
        require_nothing_lost(run, [3])
        assert hidden(run) == []
        assert contents(run / "checkpoint-3") == contents(unbroken / "checkpoint-3")
        disk("size=64m")
        if number % 5 == 0:
            process = server.start(config, run)
            assert process.code() == 0, process.said()
            require_same(run, unbroken)
        subprocess.run(["rm", "-r", str(run)], check=True)


def test_b2_space_that_comes_back_in_time(disk):
    server, config, unbroken, _ = place()
    folder = disk("size=64m")
    filler, run = folder / "filler", folder / "run"
    process = server.start(config, run, resume=False)
    process.until("\nsaved step 6: ")
    with filler.open("wb", buffering=0) as stream:
        try:
            while stream.write(b"x" * 2**20) == 2**20:
                pass
        except OSError:
            pass
        # the records' files may go on, so that this is about saves only
        stream.truncate(stream.tell() - 4 * RECORDS)
    process.until("warning: not saved: ")
    filler.unlink()
    assert process.code() == 0, process.said()
    assert 1 <= process.said().count("warning: not saved: ") <= 2
    require_nothing_lost(run, announced(process.said()))
    require_same(run, unbroken)


def test_b2_the_last_save_has_no_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTLY_FAULT", "save.written@checkpoint-3:full")
    run = tmp_path / "run"
    config = load(TrainConfig, place().config, [f"output_dir={run}", "max_steps=3"])
    with pytest.raises(
        ExpertlyError, match=r"E401.*checkpoint-3: disk full: need more than .* kB"
    ) as caught:
        loop.run(config)
    assert caught.value.exit_code == 4
    assert checkpoints(run) == [] == hidden(run)
    monkeypatch.delenv("EXPERTLY_FAULT")
    assert loop.run(config, resume=True).steps == 3


def test_b2_two_misses_and_a_hit_begin_the_count_anew(tmp_path, monkeypatch, capsys):
    misses = [3, 6, 12, 15, 21]
    order = ",".join(f"save.sealed@checkpoint-{step}:full" for step in misses)
    monkeypatch.setenv("EXPERTLY_FAULT", order)
    run = tmp_path / "run"
    loop.run(load(TrainConfig, place().config, [f"output_dir={run}"]))
    said = capsys.readouterr().err
    assert announced(said) == [9, 18, 24]
    assert said.count("warning: not saved: ") == len(misses)
    require_same(run, place().unbroken)


# --- B3, B4, B5: no inodes, read-only, a limit on files -------------------------------------------


def test_b3_a_disk_without_inodes(disk):
    server, config, unbroken, _ = place()
    each = len([unbroken, *(unbroken / "checkpoint-3").rglob("*")])
    run = disk(f"size=64m,nr_inodes={each + 14}") / "run"
    process = server.start(config, run, resume=False)
    assert process.code() == 4, process.said()
    why = "disk full: no room for another file (no inodes left). FIX: free space"
    assert (
        process.said()
        .splitlines()[-1]
        .startswith(f"expertly: error[E401] {run}/checkpoint-12: {why}")
    )
    assert announced(process.said()) == [3]
    require_nothing_lost(run, [3])
    assert hidden(run) == []


def test_b4_a_read_only_disk_is_found_before_data_is_read(disk):
    server, config, _, _ = place()
    folder = disk("size=64m")
    process = server.start(config, folder / "old", "max_steps=1", resume=False)
    assert process.code() == 0, process.said()
    before = sorted(folder.rglob("*"))
    disk("ro,size=64m")
    for name in ("new", "old"):
        process = server.start(config, folder / name, "max_steps=1")
        assert process.code() == 2
        why = "cannot be written (read-only file system). FIX: name a folder that you may write to"
        assert process.said() == f"expertly: error[E211] {folder / name}: {why}\n"
    assert sorted(folder.rglob("*")) == before


def test_b5_a_limit_on_the_size_of_files(tmp_path):
    server, config, _, _ = place()
    run = tmp_path / "run"
    process = server.start(config, run, resume=False, limits={"RLIMIT_FSIZE": 100 * 1024})
    assert process.code() == 4, process.said()
    why = "file too large. FIX: raise the limit on file sizes (ulimit -f)"
    assert process.said().endswith(f"expertly: error[E401] {run}/checkpoint-9: {why}\n")
    assert process.said().count("Training goes on") == 2
    assert checkpoints(run) == [] == hidden(run)


# --- B21: what is told is not worth a run ---------------------------------------------------------


def test_b21_nobody_reads_stderr(tmp_path):
    server, config, unbroken, _ = place()
    run = tmp_path / "run"
    process = server.start(config, run, reader=False)
    assert process.code() == 0
    assert process.result().startswith("held-out loss ")
    require_same(run, unbroken)


def test_b21_nobody_reads_stderr_and_the_exit_code_is_still_right(tmp_path):
    server, config, _, _ = place()
    run = tmp_path / "run"
    process = server.start(config, run, reader=False, fault="train.step@5:term")
    assert process.code() == 143
    require_nothing_lost(run, [5])
    process = server.start(config, run, "learning_rate=1", reader=False)
    assert process.code() == 2, "E206, though nobody can read it"
    process = server.start(config, run, reader=False, fault="train.step@7:error")
    assert process.code() == 6


def test_b21_records_wait_for_the_disk_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPERTLY_FAULT", "log.metrics@5:full,log.metrics@14:full")
    real = loop.train_step

    def train_step(config, job, recorder, guard, at):
        if at == 10:  # the disk has room again for these
            monkeypatch.setenv("EXPERTLY_FAULT", "log.metrics@14:full")
        if at == 20:
            monkeypatch.delenv("EXPERTLY_FAULT")
        return real(config, job, recorder, guard, at)

    monkeypatch.setattr(loop, "train_step", train_step)
    run = tmp_path / "run"
    loop.run(load(TrainConfig, place().config, [f"output_dir={run}"]))
    require_same(run, place().unbroken)
    said = capsys.readouterr().err
    assert said.count("the records wait") == 1, "one warning"


def test_b21_records_that_wait_outlive_a_way_back(tmp_path, monkeypatch):
    """Those of steps before the checkpoint that a run goes back to: nothing writes them again."""
    more = [f"output_dir={tmp_path / 'run'}", "max_steps=9", "optim.on_bad_step=roll_back"]
    monkeypatch.setenv("EXPERTLY_FAULT", "log.metrics@2:full,train.loss@5:nan")
    real = loop.train_step

    def train_step(config, job, recorder, guard, at):
        if job.batches.drawn > 5 * 4:  # past the batch that sent it back
            monkeypatch.setenv("EXPERTLY_FAULT", "train.loss@5:nan")
        return real(config, job, recorder, guard, at)

    monkeypatch.setattr(loop, "train_step", train_step)
    run = loop.run(load(TrainConfig, place().config, more)).run
    for file in (METRICS, ROUTER):
        steps = [each["step"] for each in told(run, file) if "train" in each or "load" in each]
        assert steps == list(range(1, 10)), file


def test_b21_a_tracker_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("EXPERTLY_FAULT", "log.board@4:error")
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", "log.report_to=[tensorboard]"]
    began = time.time()
    loop.run(load(TrainConfig, place().config, overrides))
    said = capsys.readouterr().err
    assert said.count("warning: tensorboard is left out from now on (injected at log.board)") == 1
    assert (run / "tensorboard").stat().st_mtime >= began - 1
    require_same(run, place().unbroken)
