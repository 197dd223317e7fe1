"""Texts that share a row: their logits are those of each alone, or the model is known not to."""

import numpy as np
import pytest
import torch
from tiny_families import tiny_family

from expertly.data.batches import batch_of
from expertly.data.examples import Example
from expertly.data.packing import laid_out, pack
from expertly.models.apart import keeps_apart
from expertly.models.attach import attach, tokens_of
from expertly.models.layers import own_policy

LENGTH = 24


def rows_of(sizes, *, together=True):
    drawn = np.random.default_rng(0)
    made = [
        Example(str(n), drawn.integers(1, 300, n).astype(np.int32), np.ones(n, dtype=bool))
        for n in sizes
    ]
    return pack(made, LENGTH, together=together)


def assert_apart(model, rows):
    batch = batch_of([laid_out(row, LENGTH) for row in rows], [0] * len(rows))
    with torch.no_grad():
        logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for row, found in zip(rows, logits, strict=True):
            start = 0
            for example in row:
                end = start + len(example.ids)
                ids = torch.from_numpy(example.ids).long()[None]
                alone = model(ids, use_cache=False).logits[0]
                torch.testing.assert_close(found[start:end], alone, atol=1e-5, rtol=1e-4)
                start = end
    assert not logits.isnan().any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen3_moe", {}), ("mixtral", {"sliding_window": 4}), ("deepseek_v3", {})],
)
def test_packed_texts_have_the_logits_of_each_alone(family, sizes, attention, tiny_model):
    model = tiny_model(family, **sizes)
    model.set_attn_implementation(attention)
    rows = rows_of([13, 9, 8, 5, 7, 11, 2])
    assert max(map(len, rows)) > 1
    assert_apart(model, rows)
    assert keeps_apart(model)


# its masks are not told the positions; a recurrence; convolutions
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "lfm2_moe"])
def test_families_that_do_not_keep_apart_are_known_and_have_one_text_a_row(family):
    model = tiny_family(family).train()
    assert not keeps_apart(model)
    assert model.training
    assert_apart(model.eval(), rows_of([13, 9, 5], together=False))


def test_a_policy_decides_the_same_for_packed_texts(tiny_model):
    model = tiny_model("qwen3_moe")
    with attach(model, own_policy(model.config.to_dict())):
        assert_apart(model, rows_of([13, 9, 8, 5]))


# --- Tokens ------------------------------------------------------------------------------------


def test_padding_behind_packed_texts_is_not_valid():
    rows = rows_of([13, 9, 8, 5, 7, 11, 2])
    parts = [laid_out(row, LENGTH) for row in rows]
    ids, places = (torch.from_numpy(np.stack([part[at] for part in parts])) for at in (0, 2))
    tokens = tokens_of(ids, None, places)
    sizes = [len(example.ids) for row in rows for example in row]
    assert tokens.valid.tolist() == (ids != 0).flatten().tolist()
    assert tokens.valid.sum() == sum(sizes)
    found = tokens.sequence_id[tokens.valid].unique_consecutive(return_counts=True)[1]
    assert found.tolist() == sizes


def test_a_token_by_itself_is_valid_in_decoding_and_first_in_its_row():
    one = torch.zeros(2, 1, dtype=torch.long)
    assert tokens_of(one, None, one).valid.all()
    assert tokens_of(one, None, one + 7).valid.all()
    places = torch.tensor([[0, 0, 1, 0]])
    assert tokens_of(places, None, places).valid.tolist() == [True, True, True, False]


def test_a_callers_mask_stays_as_it_is():
    mask, places = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 1, 0, 0]])
    assert tokens_of(places, mask, places).valid.tolist() == [True, True, False, False]
    assert mask.all()
