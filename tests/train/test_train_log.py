"""metrics.jsonl, TensorBoard and the lines for people."""

import json
import sys

import pytest

from expertly.errors import ExpertlyError
from expertly.train.log import (
    METRICS,
    ROUTER,
    RunLog,
    append_json,
    forget_after,
    last_health,
    read_records,
)

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


def test_a_torn_last_line_is_left_out(tmp_path):
    file = tmp_path / METRICS
    append_json(file, {"step": 1})
    with file.open("a") as stream:
        stream.write('{"step": 2, "tra')
    assert read_records(file) == [{"step": 1}]
    assert read_records(tmp_path / "missing.jsonl") == []


def test_a_damaged_line_is_an_error_with_its_file(tmp_path):
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ExpertlyError, match=r"E301.*metrics\.jsonl"):
        read_records(file)


def test_forget_after(tmp_path):
    for step in (1, 2, 3):
        append_json(tmp_path / METRICS, {"step": step, "moe": {"dead_frac": step}})
        append_json(tmp_path / ROUTER, {"step": step})
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"st')
    forget_after(tmp_path, 2)
    assert [record["step"] for record in read_records(tmp_path / METRICS)] == [1, 2]
    assert [record["step"] for record in read_records(tmp_path / ROUTER)] == [1, 2]
    assert (tmp_path / METRICS).read_bytes().endswith(b"}\n"), "the torn line is gone"
    assert last_health(tmp_path) == {"dead_frac": 2}
    forget_after(tmp_path, -1)
    assert read_records(tmp_path / METRICS) == []
    assert last_health(tmp_path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [METRICS, ROUTER]


def test_a_full_disk_is_an_error_of_the_machine(tmp_path):
    with pytest.raises(ExpertlyError, match="E401"):
        append_json(tmp_path / "no such folder" / METRICS, {"step": 1})


def test_tensorboard_tags_and_what_a_stopped_run_left_there(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, max_steps=9, tensorboard=True)
    for step in (3, 4, 5):
        log.metrics({**RECORD, "step": step})
    log.close()
    log = RunLog(tmp_path, max_steps=9, at=4, tensorboard=True)
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
