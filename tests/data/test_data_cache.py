"""Tokenise once: what is written, when it is reused, when it is made again."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from expertly import folders
from expertly.data import cache
from expertly.data.cache import Encoder, Rule, cache_root, token_sets
from expertly.data.config import Source
from expertly.errors import ExpertlyError

END = 256


class Bytes:
    """A tokenizer of bytes that counts its calls."""

    def __init__(self, vocab_size=257):
        self.calls = 0
        self.encoder = Encoder(self.encode, END, vocab_size, "bytes")

    def encode(self, texts):
        self.calls += 1
        return [list(text.encode()) for text in texts]


def documents_in(tokens):
    text = "".join("\n\0" if token == END else chr(token) for token in tokens)
    return text.split("\n\0")[:-1]


def sha256(tokens):
    return hashlib.sha256(tokens.tobytes()).hexdigest()


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "r.jsonl"
    texts = [f"text {n}" for n in range(300)] + ["text 0", "text 1"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def make(tmp_path, tokenizer, *sources, **options):
    return token_sets(sources, tokenizer.encoder, cache_dir=str(tmp_path / "cache"), **options)


def test_each_document_ends_and_lies_on_one_side(tmp_path, rows):
    (made,) = make(tmp_path, Bytes(), Source(path=str(rows)))
    train, held_out = documents_in(made.train), documents_in(made.held_out)
    assert sorted(train + held_out) == sorted(f"text {n}" for n in range(300))
    assert held_out
    assert made.domain == "r"
    assert made.train.dtype == np.dtype("<u2")
    assert isinstance(made.train, np.memmap)
    assert made.counts == {
        "documents": len(train),
        "tokens": made.train.size,
        "held_out_documents": len(held_out),
        "held_out_tokens": made.held_out.size,
        "bytes": sum(map(len, train + held_out)),
        "duplicates": 2,
        "undecodable": 0,
        "bad": 0,
    }


def test_a_large_vocabulary_takes_four_bytes(tmp_path, rows):
    (made,) = make(tmp_path, Bytes(vocab_size=65536), Source(path=str(rows)))
    assert made.train.dtype == np.dtype("<u4")


def test_an_unchanged_source_is_not_encoded_again(tmp_path, rows):
    tokenizer = Bytes()
    (first,) = make(tmp_path, tokenizer, Source(path=str(rows)))
    calls = tokenizer.calls
    (second,) = make(tmp_path, tokenizer, Source(path=str(rows)))
    assert tokenizer.calls == calls
    assert np.array_equal(first.train, second.train)
    assert first.digest == second.digest == sha256(first.train)
    assert first.held_out_digest == second.held_out_digest == sha256(first.held_out)


def test_an_edited_file_is_encoded_again(tmp_path, rows):
    tokenizer = Bytes()
    make(tmp_path, tokenizer, Source(path=str(rows)))
    calls = tokenizer.calls
    rows.write_text(rows.read_text().replace("text 7", "edit 7"))  # as long as before
    later = rows.stat().st_mtime_ns + 10**9
    os.utime(rows, ns=(later, later))
    (made,) = make(tmp_path, tokenizer, Source(path=str(rows)))
    assert tokenizer.calls > calls
    assert "edit 7" in documents_in(made.train) + documents_in(made.held_out)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"column": "body"}, id="column"),
        pytest.param({"eval": True}, id="eval"),
        pytest.param({"eval_fraction": 0.1}, id="eval_fraction"),
        pytest.param({"skip_bad": True}, id="skip_bad"),
        pytest.param({"fingerprint": "other"}, id="tokenizer"),
        pytest.param({"end_of_text": 0}, id="end of text"),
    ],
)
def test_whatever_decides_the_tokens_is_in_the_key(rows, change):
    def key(column="text", eval=False, eval_fraction=0.05, skip_bad=False, **encoder):
        source = Source(path=str(rows), column=column, eval=eval)
        rule = Rule(eval_fraction, skip_bad)
        return cache.cache_key([source], Bytes().encoder._replace(**encoder), rule)

    assert key() == key()
    assert key(**change) != key()


def test_a_truncated_cache_is_made_again(tmp_path, rows):
    tokenizer = Bytes()
    (first,) = make(tmp_path, tokenizer, Source(path=str(rows)))
    tokens = first.train.copy()
    (file,) = (tmp_path / "cache").glob("*/train.bin")
    file.write_bytes(file.read_bytes()[:10])
    (second,) = make(tmp_path, tokenizer, Source(path=str(rows)))
    assert np.array_equal(second.train, tokens)
    (file.parent / folders.MANIFEST).unlink()
    (third,) = make(tmp_path, tokenizer, Source(path=str(rows)))
    assert np.array_equal(third.train, tokens)


def test_bad_rows_are_left_out_and_counted_where_that_is_asked(tmp_path, rows):
    good = rows.read_text()
    rows.write_text(good + '{"text": \n{"text": "\\ud800"}\n{"texts": "x"}\n')
    source = Source(path=str(rows))
    with pytest.raises(ExpertlyError, match=rf"error\[E304\] {rows}:303: is not JSON"):
        make(tmp_path, Bytes(), source)
    assert not list((tmp_path / "cache").iterdir())
    (made,) = make(tmp_path, Bytes(), source, skip_bad=True)
    assert made.counts["bad"] == 3
    assert made.counts["documents"] + made.counts["held_out_documents"] == 300
    tokenizer = Bytes()
    (again,) = make(tmp_path, tokenizer, source, skip_bad=True)
    assert (again.counts, tokenizer.calls) == (made.counts, 0)
    with pytest.raises(ExpertlyError, match="E304"):  # what was skipped is not forgotten
        make(tmp_path, Bytes(), source)


def test_rows_that_are_all_bad_are_no_data(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(ExpertlyError, match=r"error\[E303\] domain a: .*2 undecodable"):
        make(tmp_path, Bytes(), Source(path=str(tmp_path / "a.jsonl")), skip_bad=True)


def test_the_slower_of_two_processes_uses_the_other_ones_folder(tmp_path, rows, monkeypatch):
    source = Source(path=str(rows))
    save = folders.save_folder

    def overtaken(target, write):
        save(target, write)  # the other process
        return save(target, write)

    monkeypatch.setattr(folders, "save_folder", overtaken)
    (made,) = make(tmp_path, Bytes(), source)
    assert made.counts["documents"]


def test_large_documents_are_encoded_in_pieces_and_end_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BATCH", 100)
    text = "".join(f"line {n}\n" for n in range(200))
    (tmp_path / "big.txt").write_text(text)
    tokenizer = Bytes()
    (made,) = make(tmp_path, tokenizer, Source(path=str(tmp_path / "big.txt")), eval_fraction=0.0)
    assert tokenizer.calls > 10
    assert documents_in(made.train) == [text]
    assert made.counts["documents"] == 1
    assert made.held_out.size == 0


def test_domains_of_eval_sources_do_not_train(tmp_path, rows):
    other = tmp_path / "valid.txt"
    other.write_text("valid")
    seen = []
    train, valid = make(
        tmp_path,
        Bytes(),
        Source(path=str(rows)),
        Source(path=str(other), eval=True),
        progress=lambda *report: seen.append(report),
    )
    assert (train.trains, valid.trains, valid.domain) == (True, False, "valid")
    assert documents_in(valid.held_out) == ["valid"]
    assert ("r", train.counts["documents"], train.counts["tokens"]) in seen


def test_a_domain_without_documents_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff")
    fix = "FIX: add UTF-8 text"
    with pytest.raises(ExpertlyError, match=rf"error\[E303\] domain a.*1 undecodable.*{fix}"):
        make(tmp_path, Bytes(), Source(path=str(tmp_path / "a.bin")))
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_source_is_refused_before_any_tokenising(tmp_path, rows):
    tokenizer = Bytes()
    with pytest.raises(ExpertlyError, match=r"error\[E303\].*no such file"):
        make(tmp_path, tokenizer, Source(path=str(rows)), Source(path=str(tmp_path / "none")))
    assert not tokenizer.calls


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, rows):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ExpertlyError, match=r"error\[E401\].*FIX:"):
        make(tmp_path, Bytes(), Source(path=str(rows)))


def test_the_cache_root_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "expertly" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "expertly" / "tokens"
