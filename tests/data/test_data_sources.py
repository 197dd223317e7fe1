"""Domains, held-out documents, copies, and the tokenizer's sample."""

import hashlib
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.data.config import Source
from expertly.data.sources import (
    by_domain,
    domain_weights,
    expand,
    is_held_out,
    pieces,
    split_documents,
    training_sample,
)
from expertly.errors import ExpertlyError


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def split(*sources, eval_fraction=0.05):
    skipped = []
    found = list(split_documents(sources, eval_fraction, lambda *told: skipped.append(told)))
    train = [document for document, held_out in found if not held_out]
    return train, [document for document, held_out in found if held_out], skipped


def test_the_rule_of_the_house():
    for name in ("a", "b/c.txt", "d.jsonl:17"):
        remainder = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        assert is_held_out(name, 0.05) == (remainder < 5)
        assert is_held_out(name, 0.07) == (remainder < 7)  # 100 * 0.07 is above 7 in floats
        assert not is_held_out(name, 0.0)
        assert is_held_out(name, 1.0)


def test_about_the_fraction_is_held_out_and_nothing_twice(tmp_path):
    rows = write_rows(tmp_path / "r.jsonl", [f"document {n}" for n in range(2000)])
    train, held_out, _ = split(Source(path=str(rows)))
    assert 60 < len(held_out) < 140
    assert len(train) + len(held_out) == 2000
    assert not {document.id for document in train} & {document.id for document in held_out}


@given(numbers=st.lists(st.integers(0, 30), min_size=1), fraction=st.sampled_from([0.05, 0.5]))
def test_a_copy_never_lies_on_both_sides(tmp_path_factory, numbers, fraction):
    rows = write_rows(tmp_path_factory.mktemp("d") / "r.jsonl", [f"text {n}" for n in numbers])
    train, held_out, skipped = split(Source(path=str(rows)), eval_fraction=fraction)
    texts = [document.text for document in train + held_out]
    assert sorted(texts) == sorted({f"text {n}" for n in numbers})
    assert len(skipped) == len(numbers) - len(texts)
    assert {why for _, why in skipped} <= {"duplicates"}


def test_an_eval_source_is_held_out_whole_and_takes_its_copies_from_training(tmp_path):
    train_rows = write_rows(tmp_path / "t.jsonl", [f"text {n}" for n in range(50)])
    eval_rows = write_rows(tmp_path / "e.jsonl", [f"text {n}" for n in range(40, 60)])
    sources = [Source(path=str(train_rows)), Source(path=str(eval_rows), eval=True)]
    train, held_out, _ = split(*sources, eval_fraction=0.0)
    assert {document.text for document in train} == {f"text {n}" for n in range(40)}
    assert {document.text for document in held_out} == {f"text {n}" for n in range(40, 60)}


def test_domains_are_named_by_their_paths(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.md").write_text("a")
    paths = {
        str(tmp_path / "books"): "books",
        str(tmp_path / "books" / "**" / "*.md"): "books",
        str(tmp_path / "books" / "a.md"): "a",
        "hf:org/name/config": "name",
        "site:headers": "site-headers",
    }
    sources = [Source(path=path) for path in paths]
    assert [source.domain for source in expand(sources)[0]] == list(paths.values())
    assert list(by_domain(sources)) == ["books", "a", "name", "site-headers"]
    assert expand(expand(sources)[0]) == expand(sources)


def test_bare_names_give_three_domains_each():
    domains = by_domain([Source(path="stdlib"), Source(path="site")])
    first, second = ["code", "docs", "tables"], ["site-code", "site-headers", "site-texts"]
    assert list(domains) == first + second
    assert list(by_domain([Source(path="stdlib", domain="all")])) == ["all"]


def test_what_was_expanded_is_not_walked_again(monkeypatch):
    sources, missing = expand([Source(path="stdlib", weight=3.0), Source(path="site", weight=1.0)])
    monkeypatch.setattr("expertly.data.sources.builtin_files", lambda name: pytest.fail("walked"))
    assert expand(sources) == (sources, [])
    assert len(by_domain(sources)) == len(sources)
    assert sum(domain_weights(sources).values()) == pytest.approx(4.0)
    assert len(sources) + len(missing) == 6


def test_no_source_is_refused():
    with pytest.raises(ExpertlyError, match=r"error\[E303\] data.sources.*FIX: name a file"):
        by_domain([])


def test_weights_add_up_over_a_domain():
    a, b = Source(path="a.txt", weight=1.0), Source(path="b/a.txt", weight=2.0)
    assert domain_weights([a, b, Source(path="e.txt", eval=True)]) == {"a": 3.0}
    assert domain_weights([Source(path="a.txt"), Source(path="b.txt")]) is None


@pytest.mark.parametrize("weight", [None, 0.0, -1.0, float("nan")])
def test_a_missing_or_senseless_weight_is_refused(weight):
    sources = [Source(path="a.txt", weight=1.0), Source(path="b.txt", weight=weight)]
    with pytest.raises(ExpertlyError, match=r"error\[E202\] b.txt.*FIX: give every training"):
        domain_weights(sources)


@given(st.text(alphabet="ab\n"), st.integers(1, 9))
def test_pieces_join_to_the_text(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= limit


def test_the_sample_holds_training_documents_only_and_spreads(tmp_path):
    texts = [f"document {n:04d}" for n in range(4000)]
    source = Source(path=str(write_rows(tmp_path / "r.jsonl", texts)))
    train = [document.text for document in split(source)[0]]
    assert training_sample([source], 1 << 20, 0.05) == train
    sample = training_sample([source], 5000, 0.05)
    assert 2500 <= sum(map(len, sample)) <= 5000
    assert set(sample) <= set(train)
    places = [train.index(text) for text in sample]
    steps = {after - before for before, after in pairwise(places)}
    assert len(steps) == 1  # every n-th one
    assert sample == training_sample([source], 5000, 0.05)
    assert training_sample([source], 1, 0.05) == train[:1]


def test_the_sample_spreads_inside_one_large_document(tmp_path):
    (tmp_path / "big.txt").write_text("".join(f"line {n}\n" for n in range(50_000)))
    sample = training_sample([Source(path=str(tmp_path / "big.txt"))], 100_000, 0.0)
    assert len(sample) > 2
    assert 50_000 <= sum(map(len, sample)) <= 100_000
