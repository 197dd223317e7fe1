"""Packing: every example once and whole, positions from 0, an order that can be resumed."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.data.batches import Batches
from expertly.data.examples import Example, ExampleSet
from expertly.data.packing import PackedSet, laid_out, pack, packed_eval_batches
from expertly.errors import ExpertlyError

LENGTH = 16
lengths = st.lists(st.integers(2, LENGTH), min_size=1, max_size=25)


def examples(sizes, start=1):
    """Example n holds only the number n; its last token is learnt."""
    return [
        Example(f"{n}", np.full(size, n, dtype=np.int32), np.arange(size) == size - 1)
        for n, size in enumerate(sizes, start=start)
    ]


def example_set(domain, sizes, held_out=(), start=1):
    return ExampleSet(domain, examples(sizes, start), examples(held_out, 500), {})


def batches(sets, *, seed=0, together=True):
    packed = [PackedSet(each, LENGTH, together=together) for each in sets]
    return Batches(packed, batch_size=2, sequence_length=LENGTH, seed=seed)


@settings(max_examples=40)
@given(lengths)
def test_every_example_is_packed_once(sizes):
    rows = pack(examples(sizes), LENGTH)
    assert sorted(int(each.id) for row in rows for each in row) == [*range(1, len(sizes) + 1)]
    used = [sum(len(each.ids) for each in row) for row in rows]
    assert max(used) <= LENGTH
    # of two rows at most one can be half empty, or best fit would have joined them
    assert sum(size <= LENGTH // 2 for size in used) <= 1


def slow_pack(sizes):
    """Best fit decreasing by its definition: the fullest row that has room."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fits = [row for row in rows if sum(row) + size <= LENGTH]
        if not fits:
            rows.append([size])
        else:
            max(fits, key=sum).append(size)
    return sorted(map(sum, rows))


@settings(max_examples=40)
@given(lengths)
def test_it_is_best_fit_decreasing(sizes):
    rows = pack(examples(sizes), LENGTH)
    assert sorted(sum(len(each.ids) for each in row) for row in rows) == slow_pack(sizes)
    alone = pack(examples(sizes), LENGTH, together=False)
    assert [len(row) for row in alone] == [1] * len(sizes)


@settings(max_examples=40)
@given(lengths)
def test_a_row_begins_at_0_in_each_example_and_stays_there_behind_the_last(sizes):
    for row in pack(examples(sizes), LENGTH):
        ids, learnt, places = laid_out(row, LENGTH)
        want = [place for each in row for place in range(len(each.ids))]
        assert places.tolist() == want + [0] * (LENGTH - len(want))
        assert ids[: len(want)].tolist() == [int(each.id) for each in row for _ in each.ids]
        assert not ids[len(want) :].any() and not learnt[len(want) :].any()
        assert learnt.sum() == len(row)


@settings(max_examples=40)
@given(lengths, st.integers(0, 6), st.integers(0, 2**31))
def test_an_epoch_holds_every_example_once_and_a_run_resumes(sizes, cut, seed):
    sets = [example_set("a", sizes), example_set("b", [3, 5], start=100)]
    drawn = batches(sets, seed=seed)
    assert drawn.rows_per_epoch == len(pack(sets[0].train, LENGTH)) + 1
    for _ in range(cut):
        next(drawn)
    again = batches(sets, seed=seed)
    again.restore(json.loads(json.dumps(drawn.state())))
    for ours, theirs in zip(next(drawn), next(again), strict=True):
        assert (ours is None and theirs is None) or ours.equal(theirs)
    alone = Batches([PackedSet(sets[0], LENGTH)], batch_size=1, sequence_length=LENGTH, seed=seed)
    seen = [next(alone) for _ in range(alone.rows_per_epoch)]
    firsts = torch.cat([b.input_ids[(b.position_ids == 0) & (b.input_ids > 0)] for b in seen])
    assert sorted(firsts.tolist()) == [*range(1, len(sizes) + 1)]


def test_shapes_types_and_cut_padding():
    batch = next(batches([example_set("a", [5, 7, 4, 9])], together=False))
    width = batch.input_ids.shape[1]
    assert width in (5, 7, 9) and batch.attention_mask is None
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.learnt.dtype == torch.bool
    assert {each.shape for each in (batch.input_ids, batch.learnt, batch.position_ids)} == {
        (2, width)
    }


@pytest.mark.parametrize("change", ["row", "packing"])
def test_a_resume_with_other_rows_is_refused(change):
    state = batches([example_set("a", [5, 7, 4])]).state()
    other = batches([example_set("a", [5, 8, 4] if change == "row" else [5, 7, 4])], seed=1)
    with pytest.raises(ExpertlyError, match=r"error\[E206\] data order"):
        other.restore(state)


def test_held_out_rows_are_of_one_domain_and_limited():
    sets = [example_set("a", [5], held_out=[16, 9, 7, 3]), example_set("b", [4], held_out=[2])]
    options = {"batch_size": 2, "sequence_length": LENGTH}
    drawn = packed_eval_batches(sets, eval_tokens=100, **options)
    assert [batch.domains.tolist() for batch in drawn] == [[0, 0], [0], [1]]
    assert drawn[-1].input_ids.shape == (1, 2)
    few = packed_eval_batches(sets[:1], eval_tokens=26, **options)
    assert sorted(set(few[0].input_ids.flatten().tolist())) == [0, 500, 501]
    one = packed_eval_batches(sets[:1], eval_tokens=2, **options)
    assert [batch.input_ids.shape for batch in one] == [(1, 16)]
    apart = packed_eval_batches(sets, eval_tokens=100, together=False, **options)
    assert [len(batch.domains) for batch in apart] == [2, 2, 1]


def test_no_held_out_row_is_one_line():
    options = {"batch_size": 2, "sequence_length": LENGTH, "eval_tokens": 9}
    with pytest.raises(ExpertlyError, match=r"error\[E303\].*no row is held out\. FIX: add rows"):
        packed_eval_batches([example_set("a", [5])], **options)
