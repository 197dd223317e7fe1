"""Examples: read from every kind of file, held out, cut, counted; a line for every bad row."""

import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from expertly.data.config import Source
from expertly.data.dialogues import Completion, Dialogue
from expertly.data.examples import Tokens, read_examples
from expertly.data.sources import is_held_out
from expertly.errors import ExpertlyError

LENGTH = 16


def encode(said):
    """A token a character; of a dialogue the assistant's are learnt."""
    if isinstance(said, Dialogue):
        parts = [(m["content"], m["role"] == "assistant") for m in said.messages]
    elif isinstance(said, Completion):
        parts = [(said.prompt, False), (said.text, True)]
    else:
        parts = [(said, True)]
    pairs = [(ord(letter), learns) for text, learns in parts for letter in text]
    return Tokens([token for token, _ in pairs], [learns for _, learns in pairs])


def chat(asked, answered):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": turns}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*paths, skip_bad=False, eval_fraction=0.05, length=LENGTH, **fields):
    sources = [p if isinstance(p, Source) else Source(path=str(p), **fields) for p in paths]
    options = {"eval_fraction": eval_fraction, "skip_bad": skip_bad}
    return read_examples(sources, encode, length=length, **options)


def refusal(*paths, **options):
    with pytest.raises(ExpertlyError) as caught:
        read(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(examples):
    return {"".join(map(chr, example.ids)) for example in examples}


ROWS = [chat(f"q{n}", f"a{n}") for n in range(40)]


def test_rows_are_split_as_documents_are(tmp_path):
    (found,) = read(write(tmp_path / "chats.jsonl", ROWS))
    ids = [f"chats.jsonl:{n}" for n in range(1, 41)]
    assert [each.id for each in found.held_out] == [id for id in ids if is_held_out(id, 0.05)]
    assert {each.id for each in found.train + found.held_out} == set(ids)
    assert found.domain == "chats" and found.trains
    first = found.train[0]
    assert first.ids.dtype == np.int32 and first.learnt.dtype == bool
    assert first.learnt.tolist() == [False, False, True, True]
    counts = found.counts
    assert counts["documents"] + counts["held_out_documents"] == 40
    assert counts["tokens"] == sum(len(each.ids) for each in found.train)
    assert counts["learnt"] == sum(int(each.learnt.sum()) for each in found.train)


def written(kind, folder):
    if kind == "lines":
        return write(folder / "rows.jsonl", ROWS)
    if kind in ("array", "array in a folder"):
        file = folder / "sets" / "rows.json"
        file.parent.mkdir()
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
        return file.parent if kind == "array in a folder" else file
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
        return folder / "rows.parquet"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "rows")
    return f"hf:{folder / 'rows'}"


@pytest.mark.parametrize("kind", ["lines", "array", "array in a folder", "parquet", "hf"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    (found,) = read(written(kind, tmp_path))
    assert texts(found.train + found.held_out) == {f"q{n}a{n}" for n in range(40)}


def test_formats_may_be_mixed_and_a_text_file_is_one_row(tmp_path):
    rows = [chat("q", "a"), {"prompt": "p", "completion": "c"}, {"text": "tt"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "note.txt").write_text("a note\n")
    write(tmp_path / "set" / "rows.jsonl", rows)
    (found,) = read(tmp_path / "set")
    assert texts(found.train + found.held_out) == {"qa", "pc", "tt", "a note"}


def test_one_row_is_held_out_where_the_rule_takes_none(tmp_path):
    file = write(tmp_path / "some.jsonl", ROWS[:3])
    assert not any(is_held_out(f"some.jsonl:{n}", 0.05) for n in (1, 2, 3))
    (found,) = read(file)
    assert (len(found.train), len(found.held_out)) == (2, 1)
    (none,) = read(file, eval_fraction=0.0)
    assert (len(none.train), len(none.held_out)) == (3, 0)
    (one,) = read(write(tmp_path / "one.jsonl", ROWS[:1]), eval_fraction=0.99)
    assert (len(one.train), len(one.held_out)) == (1, 0)
    (most,) = read(file, eval_fraction=0.99)
    assert most.trains


def test_an_eval_source_of_the_same_name_is_all_held_out(tmp_path):
    write(tmp_path / "a" / "chats.jsonl", ROWS[:5])
    write(tmp_path / "b" / "chats.jsonl", ROWS[3:8])
    ours = Source(path=str(tmp_path / "a" / "chats.jsonl"))
    theirs = Source(path=str(tmp_path / "b" / "chats.jsonl"), eval=True)
    (found,) = read(ours, theirs)
    assert texts(found.held_out) == {f"q{n}a{n}" for n in range(3, 8)}
    assert texts(found.train) == {f"q{n}a{n}" for n in range(3)}
    assert found.counts["duplicates"] == 2


def test_long_rows_are_cut_and_rows_without_a_turn_to_learn_left_out(tmp_path):
    rows = [
        chat("q" * 10, "a" * 10),  # cut within the answer
        chat("r" * 16, "a"),  # the answer is behind the cut
        {"messages": [{"role": "user", "content": "alone"}]},
        {"text": "x"},  # its one token follows none
        chat("q" * 10, "a" * 12),  # after the cut a copy of the first
        chat("s", "t"),
    ]
    (found,) = read(write(tmp_path / "rows.jsonl", rows))
    assert texts(found.train + found.held_out) == {"q" * 10 + "a" * 6, "st"}
    assert found.counts["cut"] == 3
    assert found.counts["unlearnable"] == 3
    assert found.counts["duplicates"] == 1


def test_digests_tell_what_is_learnt(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    (first,), (again,) = read(file), read(file)
    assert first.digest == again.digest and first.held_out_digest == again.held_out_digest
    swapped = [{"prompt": "q0a", "completion": "0"}, *ROWS[1:]]  # the same tokens, another mask
    (other,) = read(write(tmp_path / "rows.jsonl", swapped))
    assert other.digest != first.digest and other.held_out_digest == first.held_out_digest


def test_nothing_to_learn_is_one_line(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    line = r"error\[E304\] domain rows: has no assistant turn in it\. FIX: give rows with"
    assert re.match(line, refusal(write(tmp_path / "rows.jsonl", rows)))


BAD = {
    "broken": (b"{", r":2: is not JSON"),
    "a number": (b"3", r":2: is not a JSON object\. FIX: .*messages"),
    "a bad role": (b'{"messages": [{"role": "x", "content": ""}]}', r":2: messages\[0\] has the"),
    "no columns": (b'{"body": "x"}', r":2: has none of the columns .*FIX: correct the row"),
    "empty": (b'{"messages": []}', r":2: messages is empty"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_one_line_or_is_counted(fault, tmp_path):
    line, why = BAD[fault]
    file = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in ROWS[:2]]
    file.write_bytes(b"\n".join([good[0], line, b"", good[1]]))
    assert re.search(r"error\[E304\] \S*rows\.jsonl" + why, refusal(file))
    (found,) = read(file, skip_bad=True)
    assert (found.counts["bad"], len(found.train + found.held_out)) == (1, 2)


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path):
    def refuse(said):
        raise ValueError("the chat template refuses it")

    file = write(tmp_path / "rows.jsonl", ROWS[:1])
    options = {"length": LENGTH, "eval_fraction": 0.05}
    with pytest.raises(ExpertlyError, match=r"E304.*rows.jsonl:1: the chat template refuses it"):
        read_examples([Source(path=str(file))], refuse, **options)


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "x"}')
    assert re.search(r"E304\] \S*rows\.json: is not JSON", refusal(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('[{"text": "x"}, 3]')
    line = r"E304\] \S*rows\.json:2: is not a JSON object"
    assert re.search(line, refusal(tmp_path / "rows.json"))
    (tmp_path / "rows.parquet").write_text("none")
    assert re.search(r"E304\] \S*parquet: cannot be read", refusal(tmp_path / "rows.parquet"))
    assert re.search(r"E303\] \S*no\.jsonl: no such file", refusal(tmp_path / "no.jsonl"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "no assistant turn" in refusal(tmp_path / "bytes.txt")
