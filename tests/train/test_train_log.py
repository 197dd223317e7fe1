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
    log = RunLog(tmp_path, max_steps=9)
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

    log = RunLog(tmp_path, max_steps=9, tensorboard=True)
    log.begin(None)
    for step in (3, 4, 5):
        log.metrics({**RECORD, "step": step})
    log.close()
    log = RunLog(tmp_path, max_steps=9, tensorboard=True)
    log.begin(4)
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
        RunLog(tmp_path, max_steps=9, tensorboard=True)
    RunLog(tmp_path, max_steps=9).close()
