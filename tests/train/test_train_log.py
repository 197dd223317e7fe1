"""metrics.jsonl, TensorBoard and the lines for people."""

import json
import sys

import pytest

from expertly.errors import ExpertlyError
from expertly.train.log import RunLog
from expertly.watch.records import METRICS, ROUTER, read_records

RECORD = {
    "step": 3,
    "tokens": 30,
    "seconds": 1.5,
    "train": {"loss": 2.5},
    "eval": {"loss": 2.0, "domain": {"code": 1.0}},
    "moe": {"dead_frac": 0.0, "worst_layer": 1},
}


def test_records_are_lines(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.begin(None, 9)
    log.metrics(RECORD)
    log.metrics({**RECORD, "step": 4})
    log.router({"step": 3, "load": [[0.5, 0.5]]})
    log.advance(3, "loss 2.5", due=True)
    log.advance(4, "loss 2.4", due=False)
    log.say("a line with [brackets] and a very long path" + "/x" * 200)
    log.close()
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4]
    assert json.loads(lines[0]) == RECORD
    assert read_records(tmp_path / ROUTER) == [{"step": 3, "load": [[0.5, 0.5]]}]
    told = capsys.readouterr()
    assert told.out == "", "results only go to stdout"
    assert "step 3/9  loss 2.5\n" in told.err
    assert "step 4/9" not in told.err
    assert "[brackets] and a very long path" + "/x" * 200 in told.err


def test_tensorboard_tags_and_what_a_stopped_run_left_there(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True)
    log.begin(None, 9)
    for step in (3, 4, 5):
        log.metrics({**RECORD, "step": step})
    log.close()
    log = RunLog(tmp_path, tensorboard=True)
    log.begin(4, 9)
    log.metrics({**RECORD, "step": 5, "train": {"loss": 1.5}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"train/loss", "eval/loss", "eval/domain/code", "moe/dead_frac", "moe/worst_layer"}
    assert set(events.Tags()["scalars"]) == tags
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (3, 2.5),
        (4, 2.5),
        (5, 1.5),
    ]
    assert read_records(tmp_path / METRICS)[0] == RECORD, "metrics.jsonl is always written"


def test_missing_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ExpertlyError, match=r"E207.*expertly\[tensorboard\]"):
        RunLog(tmp_path, tensorboard=True)
    RunLog(tmp_path).close()


def refusing(monkeypatch, *steps):
    """A disk that refuses the records of some steps."""
    monkeypatch.setenv("EXPERTLY_FAULT", ",".join(f"log.metrics@{step}:full" for step in steps))


def steps(folder, name=METRICS):
    return [record["step"] for record in read_records(folder / name)]


def test_records_wait_in_their_order(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path)
    refusing(monkeypatch, 2)
    for step in (1, 2, 3):
        log.metrics({"step": step})
        log.router({"step": step, "load": []})
    assert (steps(tmp_path), steps(tmp_path, ROUTER)) == ([1], [1])
    refusing(monkeypatch)
    log.metrics({"step": 4})
    assert (steps(tmp_path), steps(tmp_path, ROUTER)) == ([1, 2, 3, 4], [1, 2, 3])
    refusing(monkeypatch, 5)
    log.metrics({"step": 5})
    refusing(monkeypatch)
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5], "the last try is at the end"
    said = capsys.readouterr().err
    assert said.count("Training goes on, the records wait") == 1
    assert "lost" not in said


def test_what_the_disk_never_took_is_said(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path)
    refusing(monkeypatch, 1)
    log.metrics({"step": 1})
    log.metrics({"step": 2})
    log.close()
    assert "warning: 2 records are lost, the disk did not take them" in capsys.readouterr().err


def test_beginning_again_takes_back_what_is_later(tmp_path, monkeypatch):
    """Also of the records that wait; earlier ones go on waiting, for nothing writes them again."""
    log = RunLog(tmp_path)
    log.metrics({"step": 1})
    refusing(monkeypatch, 2)
    for step in (2, 3, 4):
        log.metrics({"step": step})
    log.begin(3, 9)
    refusing(monkeypatch)
    log.metrics({"step": 4, "again": True})
    assert steps(tmp_path) == [1, 2, 3, 4]
    log.begin(None, 9)
    assert steps(tmp_path) == []
    log.close()


def test_a_reader_that_left_is_no_reason_to_end(tmp_path, monkeypatch):
    class Gone:
        """A terminal that was closed."""

        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stderr", Gone())
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.say("a line")
        log.metrics({"step": step})
        log.advance(step, "loss", due=True)
    log.close()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("where", ["open", 2, "close"])
def test_a_tracker_that_fails_is_left_out_and_said_once(where, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("EXPERTLY_FAULT", f"log.board@{where}:error")
    log = RunLog(tmp_path, tensorboard=True)
    log.begin(None, 9)
    for step in (1, 2, 3):
        log.metrics({"step": step, "train": {"loss": 1.0}})
    log.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().err.count("tensorboard is left out") == 1
