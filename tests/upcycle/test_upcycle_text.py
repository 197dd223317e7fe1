"""The text that an upcycling reads: held out or not, evenly of its domains, known to the model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.upcycle.text import cut_evenly, prompt_rows, text_rows


def of(job, tokens=256, *, held_out=False):
    return text_rows(job, tokens, held_out=held_out)


def test_rows_are_as_long_as_the_model_reads(prepared):
    rows = of(prepared("llama"))
    assert (rows.shape, rows.dtype) == ((2, 128), torch.long), "128 positions"
    assert of(prepared("llama"), 64).shape == (1, 64)
    assert torch.equal(rows, of(prepared("llama"))), "the same every time"


def test_held_out_text_is_not_the_others(prepared):
    job = prepared("llama")
    held_out, others = (set(map(tuple, of(job, 128, held_out=x).tolist())) for x in (True, False))
    assert not held_out & others


def test_every_domain_has_its_part(prepared, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 4000)
    job = prepared("llama", data=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    first, second = of(job)
    said = [set(job.tokenizer.decode(row).split()) for row in (first, second)]
    assert sorted(said, key=min) == [{"a"}, {"b"}]


def test_little_text_is_one_short_row(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    rows = of(prepared("llama", data=[str(tmp_path / "a.txt")]))
    assert rows.shape[0] == 1 and 2 <= rows.shape[1] < 128


def test_no_text(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ExpertlyError, match=r"E303.*no readable text"):
        of(prepared("llama", data=[str(tmp_path / "a.txt")]))


def test_a_tokenizer_of_another_model(prepared):
    job = prepared("llama", keys={"vocab_size": 40})
    with pytest.raises(ExpertlyError, match=r"E202\] tokenizer: it makes token \d+, the model has"):
        of(job)
    with pytest.raises(ExpertlyError, match=r"E202\] tokenizer: it makes token"):
        prompt_rows(job, ("the cat",))


def test_prompts_are_cut_where_positions_end(prepared):
    job = prepared("llama")
    short, long = prompt_rows(job, ("the cat", "the dog sees " * 200))
    assert short.dim() == 1 and len(short) < 20
    assert len(long) == 128
    assert len(prompt_rows(job, ("",))[0]) == 1, "an end of text"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 300))
def test_the_longest_prompts_are_cut_until_all_fit(lengths, tokens):
    texts = [torch.arange(length) for length in lengths]
    cut = [len(text) for text in cut_evenly(texts, tokens)]
    most = max(cut)
    assert cut == [min(length, most) for length in lengths]
    assert sum(cut) <= tokens or most <= 16
    if most < max(lengths):
        assert most == 16 or sum(min(length, most + 1) for length in lengths) > tokens
        assert most >= 16
    assert all(torch.equal(text, torch.arange(len(text))) for text in cut_evenly(texts, tokens))


def test_so_much_of_the_other_documents_is_passed_over(text, prepared, monkeypatch):
    """Then the domain counts as one without held-out documents, and gives of all."""
    job = prepared("llama")
    whole = of(job, held_out=True)
    monkeypatch.setattr("expertly.data.sample._PASSED", 10)
    first = of(job, held_out=True)
    assert not torch.equal(first, whole)
    assert torch.equal(first, of(job, held_out=True))
