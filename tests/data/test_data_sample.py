"""A sample of text as rows, for a look at a model."""

import pytest

from expertly.data.config import DataConfig, Source
from expertly.data.sample import sample_rows
from expertly.data.sources import split_documents
from expertly.errors import ExpertlyError
from expertly.models.tokenizer import encode_batch


def encode(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def rows(*paths, tokens=64, length=16, held_out=None):
    sources = [Source(path=str(path)) for path in paths]
    return sample_rows(sources, encode, 0, tokens=tokens, sequence_length=length, held_out=held_out)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "long.txt").write_text("abcdefghij" * 100)
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_a_domain_is_rows_of_its_tokens(texts):
    made = rows(texts / "long.txt", texts / "short.txt")
    assert list(made) == ["long", "short"]
    assert made["long"].shape == (4, 16)
    assert made["long"].flatten().tolist() == list(("abcdefghij" * 7).encode())[:64]
    assert made["short"].tolist() == [[*b"abc", 0]], "one shorter row, its end of text included"


def test_it_is_the_same_every_time(texts):
    assert all((a == b).all() for a, b in zip(*[rows(texts).values() for _ in "ab"], strict=True))


def test_a_large_domain_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr("expertly.data.sample._READ", 5000)
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(name * 2000)
    found = {chr(token) for token in rows(tmp_path, tokens=4096)[tmp_path.name].flatten() if token}
    assert found == {"a", "b", "c"}, "evenly from what was read, and no further"


def test_nothing_to_read(texts):
    with pytest.raises(ExpertlyError, match=r"E303.*no readable text"):
        rows(texts / "empty.txt")


def test_a_tokenizer_that_takes_no_empty_list_is_given_none(texts, tiny_tokenizer):
    source = [Source(path=str(texts / "empty.txt"))]
    with pytest.raises(ExpertlyError, match=r"E303.*no readable text"):
        sample_rows(
            source,
            lambda batch: encode_batch(tiny_tokenizer, batch),
            0,
            tokens=64,
            sequence_length=16,
        )


# --- Held-out documents ------------------------------------------------------------------------


def letters(found) -> set[str]:
    return {chr(token) for made in found.values() for token in made.flatten().tolist() if token}


def test_held_out_rows_are_of_the_documents_that_training_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(DataConfig, "eval_fraction", 0.1)
    names = [chr(ord("A") + number) for number in range(58)]
    for name in names:
        (tmp_path / f"{ord(name)}.txt").write_text(name * 40)
    sources = [Source(path=str(tmp_path))]
    split = split_documents(sources, DataConfig.eval_fraction, lambda *_: None)
    out = {document.text[0] for document, held_out in split if held_out}
    assert 0 < len(out) < len(names) / 4
    every = {"tokens": 58 * 41, "length": 41}
    assert letters(rows(tmp_path, held_out=True, **every)) == out
    assert letters(rows(tmp_path, held_out=False, **every)) == {*names} - out
    assert letters(rows(tmp_path, **every)) == {*names}


@pytest.mark.parametrize("held_out", [True, False])
def test_a_domain_without_any_such_gives_of_all(held_out, texts):
    """One document is either left out or not."""
    assert rows(texts / "long.txt", held_out=held_out)["long"].shape == (4, 16)
