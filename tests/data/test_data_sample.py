"""A sample of text as rows, for a look at a model."""

import pytest

from expertly.data.config import Source
from expertly.data.sample import sample_rows
from expertly.errors import ExpertlyError


def encode(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def rows(*paths, tokens=64, length=16):
    sources = [Source(path=str(path)) for path in paths]
    return sample_rows(sources, encode, 0, tokens=tokens, sequence_length=length)


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
