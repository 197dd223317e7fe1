"""Which files a path stands for and how each kind is read; every refusal by code and text."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from expertly.data.config import Source
from expertly.data.documents import find_files
from expertly.data.sources import open_source
from expertly.errors import ExpertlyError


def read(path, *, skip_bad=False, **fields):
    skipped = []
    corpus = open_source(Source(path=str(path), **fields))
    told = corpus.read(lambda name, why: skipped.append((name, why)), skip_bad=skip_bad)
    documents = list(told)
    return documents, skipped


def refusal(path, **fields):
    with pytest.raises(ExpertlyError) as caught:
        read(path, **fields)
    assert caught.value.exit_code == 3
    return caught.value


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "notes.rst"
    file.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nend\n")
    assert read(file) == ([("notes.rst", "café\nend\n")], [])


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/config", "a/b/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_lines(tmp_path / "rows.jsonl", b'{"text": "row"}')
    write_parquet(tmp_path / "table.parquet", text=["cell"])
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would block for ever
    documents, _ = read(tmp_path)
    ids = ["b.txt", "rows.jsonl:1", "table.parquet:1", "a/z.md", "a/b/c.py"]
    assert [document.id for document in documents] == ids


def test_a_json_file_holds_rows_only_where_it_is_named(tmp_path):
    """A stray package.json in a folder must not stop a run."""
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}\n')
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows" / "a.json", b'{"text": "row"}')
    documents, _ = read(tmp_path)
    assert [document.id for document in documents] == ["package.json", "rows/a.json"]
    documents, _ = read(tmp_path / "**" / "*")
    assert [document.id for document in documents] == ["package.json", "rows/a.json"]
    for named in (tmp_path / "rows" / "a.json", tmp_path / "rows" / "*.json"):
        assert read(named)[0] == [("a.json:1", "row")]


def test_a_glob_keeps_ids_relative_to_its_folder(tmp_path):
    for name in ("a.md", "deep/er/b.md", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, _ = read(tmp_path / "**" / "*.md")
    assert [document.id for document in documents] == ["a.md", "deep/er/b.md"]


def test_a_relative_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("a")
    assert [file.id for file in find_files("*.md")] == ["a.md"]


@pytest.mark.parametrize(
    "content",
    [pytest.param(b"\xff\xfe\x00a", id="not utf-8"), pytest.param(b"a\0b", id="holds NUL")],
)
def test_a_binary_file_is_skipped_and_told(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.txt").write_text(" \n")  # blank: no document, and nothing to tell
    assert read(tmp_path) == ([("b.txt", "text")], [("a.bin", "undecodable")])


def test_json_lines_are_named_by_line_and_blank_ones_passed_over(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", b'{"body": "one"}', b"", b'{"body": "two"}')
    write_lines(tmp_path / "e.json", '{"body": "ü"}'.encode())
    assert read(file, column="body")[0] == [("d.jsonl:1", "one"), ("d.jsonl:3", "two")]
    assert read(tmp_path / "e.json", column="body")[0] == [("e.json:1", "ü")]


def test_parquet_rows_are_numbered_across_batches(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", text=[f"row {n}" for n in range(3000)])
    documents, _ = read(file)
    assert len(documents) == 3000
    assert documents[-1] == ("p.parquet:3000", "row 2999")


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "why", "fix"),
    [
        pytest.param(b'{"text": ', "is not JSON", "one JSON object per line", id="broken"),
        pytest.param(b"[" * 100_000, "is not JSON", "one JSON object per line", id="too deep"),
        pytest.param(b'{"text": "\xff"}', "is not JSON", "leave the file out", id="not utf-8"),
        pytest.param(b'["x"]', "is not a JSON object", '{"text": "..."}', id="a list"),
        pytest.param(b'{"texts": "x"}', "has no column 'text'", "write texts", id="column"),
        pytest.param(b"{}", "has no column 'text'", "leave it out", id="no column at all"),
        pytest.param(b'{"text": 3}', "holds int, not a string", "column of strings", id="number"),
        pytest.param(b'{"text": null}', "holds NoneType", "remove the row", id="null"),
        pytest.param(b'{"text": "a\\ud800"}', "lone surrogate", "remove the row", id="surrogate"),
    ],
)
def test_a_bad_json_line_is_named_with_its_fix(tmp_path, line, why, fix):
    file = write_lines(tmp_path / "bad.jsonl", GOOD, line)
    error = refusal(file)
    assert (error.code, error.what) == ("E304", f"{file}:2")
    assert why in error.why
    assert fix in error.fix


def test_an_empty_file_of_rows_is_named(tmp_path):
    (tmp_path / "a.jsonl").touch()
    error = refusal(tmp_path / "a.jsonl")
    assert (error.code, error.what, error.why) == ("E304", f"{tmp_path / 'a.jsonl'}:1", "is empty")


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"text": "c"}'])
def test_a_line_too_long_is_named_and_what_follows_is_read(tmp_path, monkeypatch, end):
    monkeypatch.setattr("expertly.data.documents._LONGEST_LINE", 40)
    fits = b'{"text": "' + b"b" * 28 + b'"}'
    for length in (41, 79, 80, 81, 82, 123, 400):
        file = tmp_path / "long.jsonl"
        file.write_bytes(GOOD + b"\n" + b"x" * length + b"\n" + fits + end)
        assert refusal(file).what == f"{file}:2"
        documents, told = read(file, skip_bad=True)
        assert [text for _, text in documents][:2] == ["good", "b" * 28]
        assert len(documents) == 2 + end.count(b"c")
        assert told == [(f"{file}:2", "bad")]


def test_bad_rows_of_parquet_are_skipped_where_that_is_asked(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", text=["a", None, "b"])
    documents, told = read(file, skip_bad=True)
    assert [text for _, text in documents] == ["a", "b"]
    assert told == [(f"{file}:2", "bad")]


def test_bad_parquet_is_named_with_its_fix(tmp_path):
    table = write_parquet(tmp_path / "p.parquet", texts=["a", None])
    error = refusal(table)
    assert (error.code, error.what, error.why) == ("E304", str(table), "has no column 'text'")
    assert "texts" in error.fix
    error = refusal(table, column="texts")
    assert (error.code, error.what) == ("E304", f"{table}:2")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(table.read_bytes()[:-20])
    error = refusal(broken)
    assert (error.code, error.what) == ("E304", str(broken))
    assert "cannot be read" in error.why


@pytest.mark.parametrize(
    ("path", "why", "fix"),
    [
        pytest.param("nowhere.txt", "no such file or folder", "correct the path", id="file"),
        pytest.param("*.md", "matches no file", "a folder that holds text", id="glob"),
        pytest.param("", "matches no file", "a folder that holds text", id="empty folder"),
    ],
)
def test_a_path_with_nothing_behind_it_is_refused(tmp_path, path, why, fix):
    error = refusal(tmp_path / path)
    assert (error.code, error.why) == ("E303", why)
    assert fix in error.fix


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_vanishes_is_refused(tmp_path, name):
    file = tmp_path / name
    file.write_text(json.dumps({"text": "x"}))
    corpus = open_source(Source(path=str(file)))
    file.unlink()
    with pytest.raises(ExpertlyError, match=r"error\[E303\].*no such file.*FIX: make it readable"):
        list(corpus.read(lambda *_: None))
