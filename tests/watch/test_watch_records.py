"""A run's records: torn and damaged lines, and what a resumed run takes back."""

import pytest

from expertly.errors import ExpertlyError
from expertly.watch.records import (
    METRICS,
    ROUTER,
    append_json,
    forget_after,
    last_health,
    read_records,
)


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


@pytest.mark.parametrize(
    "line",
    ["[1]", "7", "null", "{}", '{"step": "1"}', '{"step": true}', '{"step": 1.0}', "[" * 100_000],
    ids=lambda line: line[:12],
)
def test_a_line_that_is_no_record_is_an_error(tmp_path, line):
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ExpertlyError, match=r"E301.*metrics\.jsonl") as caught:
        read_records(file)
    assert len(str(caught.value)) < 500


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
