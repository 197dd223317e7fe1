"""The order of rows: exact on resume, complete in an epoch, true to the weights."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.data.batches import Batches, eval_batches
from expertly.data.cache import TokenSet
from expertly.errors import ExpertlyError

SEQ = 4


def token_set(domain, rows, *, held_out=0, trains=True, start=0, tail=0):
    """A domain whose row n holds only the number start + n."""
    train = np.repeat(np.arange(start, start + rows), SEQ)
    train = np.concatenate([train, np.full(tail, 999)]).astype(np.uint16)
    held = np.arange(held_out, dtype=np.uint16)
    return TokenSet(domain, train, held, {}, f"{domain}-{rows}-{start}", trains)


def batches(sets, weights=None, *, batch_size=3, seed=0):
    return Batches(sets, weights, batch_size=batch_size, sequence_length=SEQ, seed=seed)


def take(source, count):
    return [next(source) for _ in range(count)]


def row_ids(drawn):
    return [
        (int(domain), int(row[0]))
        for batch in drawn
        for domain, row in zip(batch.domains, batch.input_ids, strict=True)
    ]


def test_shapes_and_types():
    batch = next(batches([token_set("a", 5), token_set("b", 7)]))
    assert batch.input_ids.shape == (3, SEQ)
    assert batch.domains.shape == (3,)
    assert batch.input_ids.dtype == batch.domains.dtype == torch.int64
    assert batch.attention_mask is None


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(sizes=sizes, cut=st.integers(0, 12), after=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_a_resumed_run_draws_what_the_unbroken_one_does(sizes, cut, after, seed):
    sets = [token_set(f"d{n}", rows, start=100 * n) for n, rows in enumerate(sizes)]
    unbroken = row_ids(take(batches(sets, seed=seed), cut + after))
    first = batches(sets, seed=seed)
    take(first, cut)
    state = json.loads(json.dumps(first.state()))
    second = batches(sets, seed=seed)
    second.restore(state)
    assert row_ids(take(second, after)) == unbroken[cut * 3 :]
    assert second.state() != state


@given(shares=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_every_domain_keeps_its_share_within_one_row(shares):
    sets = [token_set(f"d{n}", 3) for n in range(len(shares))]
    weights = {f"d{n}": share for n, share in enumerate(shares)}
    drawn = Counter()
    order = next(batches(sets, weights, batch_size=150)).domains.tolist()
    for position, domain in enumerate(order, start=1):
        drawn[domain] += 1
        for index, share in enumerate(shares):
            assert abs(drawn[index] - position * share / sum(shares)) < 1 + 1e-9


@given(rows=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_an_epoch_holds_every_row_once(rows, seed):
    source = batches([token_set("a", rows, tail=SEQ - 1)], batch_size=1, seed=seed)
    for _ in range(2):
        assert sorted(row for _, row in row_ids(take(source, rows))) == list(range(rows))


def test_epochs_seeds_and_domains_have_orders_of_their_own():
    sets = [token_set("a", 50), token_set("b", 50)]
    drawn = row_ids(take(batches(sets, batch_size=1), 200))
    a = [row for domain, row in drawn if domain == 0]
    b = [row for domain, row in drawn if domain == 1]
    other = row_ids(take(batches(sets, batch_size=1, seed=1), 200))
    assert a[:50] != a[50:] != b[50:]
    assert a[:50] != b[:50]
    assert drawn != other


def test_the_order_is_written_in_stone():
    """A new numpy, or a rewrite, that draws other rows would break every resume."""
    drawn = row_ids(take(batches([token_set("a", 6), token_set("b", 3)], seed=7), 3))
    assert [row for domain, row in drawn if domain == 0] == [3, 4, 5, 2, 1, 0]
    assert [row for domain, row in drawn if domain == 1] == [1, 0, 2]
    assert [domain for domain, _ in drawn] == [0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_without_weights_domains_count_by_their_tokens():
    drawn = Counter(
        domain
        for domain, _ in row_ids(
            take(batches([token_set("a", 10), token_set("b", 30)], batch_size=1), 40)
        )
    )
    assert drawn == {0: 10, 1: 30}


def test_a_domain_of_eval_sources_is_never_drawn_and_keeps_its_index():
    sets = [token_set("valid", 0, held_out=9, trains=False), token_set("a", 5)]
    assert {domain for domain, _ in row_ids(take(batches(sets), 5))} == {1}


@pytest.mark.parametrize(
    ("sets", "options", "key"),
    [
        pytest.param([token_set("a", 9)], {"seed": 1}, "seed", id="seed"),
        pytest.param([token_set("a", 9, start=1)], {}, "tokens", id="data"),
        pytest.param([token_set("b", 9)], {}, "tokens", id="domain"),
    ],
)
def test_a_state_of_another_order_is_refused(sets, options, key):
    state = batches([token_set("a", 9)]).state()
    with pytest.raises(ExpertlyError, match=rf"error\[E206\] data order \({key}\).*FIX: resume"):
        batches(sets, **options).restore(state)


def test_another_batch_size_goes_on_from_the_same_row():
    sets = [token_set("a", 20), token_set("b", 9)]
    first = batches(sets, batch_size=4)
    drawn = row_ids(take(first, 2))
    second = batches(sets, batch_size=2)
    second.restore(first.state())
    assert drawn + row_ids(take(second, 2)) == row_ids(take(batches(sets, batch_size=4), 3))


@pytest.mark.parametrize(
    ("sets", "code", "text"),
    [
        pytest.param([], "E303", "nothing to train on.*without eval", id="nothing"),
        pytest.param([token_set("v", 0, trains=False)], "E303", "nothing to train", id="eval only"),
        pytest.param(
            [token_set("a", 3), token_set("b", 0, tail=3)],
            "E303",
            "domain b: 3 training tokens are less than a row of 4.*shorter data.sequence_length",
            id="less than a row",
        ),
        pytest.param(
            [token_set("a", 0, held_out=9)],
            "E303",
            "domain a: 0 training tokens.*9 are held out.*eval_fraction: 0",
            id="all held out",
        ),
    ],
)
def test_too_little_text_is_refused(sets, code, text):
    with pytest.raises(ExpertlyError, match=rf"error\[{code}\].*{text}"):
        batches(sets)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1, "b": float("nan")}])
def test_a_domain_without_weight_is_refused(weights):
    with pytest.raises(ExpertlyError, match=r"error\[E202\] domain b: has no weight.*FIX: give"):
        batches([token_set("a", 3), token_set("b", 3)], weights)


def evaluation(sets, **options):
    defaults = {"batch_size": 2, "sequence_length": SEQ, "eval_tokens": 1000}
    return eval_batches(sets, **(defaults | options))


def test_evaluation_holds_each_token_once_and_masks_the_rest():
    found = evaluation([token_set("a", 1, held_out=22), token_set("b", 1, held_out=3)])
    assert [tuple(batch.input_ids.shape) for batch in found] == [(2, 4), (2, 4), (2, 4), (1, 4)]
    assert [batch.domains.tolist() for batch in found] == [[0, 0], [0, 0], [0, 0], [1]]
    kept = [batch.input_ids[batch.attention_mask == 1] for batch in found]
    assert torch.cat(kept).tolist() == [*range(22), *range(3)]
    assert found[2].attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_evaluation_is_cut_and_leaves_out_a_row_of_one_token():
    tokens = [token_set("a", 1, held_out=50)]
    assert sum(int(b.attention_mask.sum()) for b in evaluation(tokens, eval_tokens=10)) == 10
    assert sum(int(b.attention_mask.sum()) for b in evaluation(tokens, eval_tokens=9)) == 8


def test_evaluation_without_held_out_tokens_is_refused():
    with pytest.raises(ExpertlyError, match=r"error\[E303\].*no document is held out.*eval: true"):
        evaluation([token_set("a", 5)])
