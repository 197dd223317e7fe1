"""Held-out loss against a slow loop, and that looking leaves no trace."""

from contextlib import nullcontext

import pytest
import torch

from expertly.data.batches import Batch
from expertly.train.evaluate import evaluate, to_micro

NAMES = ["code", "unused", "docs"]


def held_out() -> list[Batch]:
    """Two batches of code, one of docs, each with a padded row."""
    draw = torch.Generator().manual_seed(2)
    batches = []
    for domain, lengths in ((0, (16, 16)), (0, (16, 5)), (2, (9, 2))):
        mask = torch.arange(16) < torch.tensor(lengths).unsqueeze(-1)
        ids = torch.randint(1, 300, (2, 16), generator=draw).where(mask, 0)
        batches.append(Batch(ids, torch.full((2,), domain), mask.long()))
    return batches


def slow_losses(model, batch: Batch) -> list[float]:
    """The loss of each label, row by row without padding."""
    terms = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        row = ids[: int(mask.sum())]
        with torch.no_grad():
            logits = model(row.unsqueeze(0)).logits[0].double()
        terms += [-float(logits[i].log_softmax(-1)[row[i + 1]]) for i in range(len(row) - 1)]
    return terms


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_domains_equal_a_slow_loop(tiny, family):
    model, _ = tiny(family)
    found = evaluate(model, held_out(), NAMES, nullcontext())
    model.eval()
    code_1, code_2, docs = (slow_losses(model, batch) for batch in held_out())
    code = code_1 + code_2
    assert found.domains.keys() == {"code", "docs"}
    assert found.domains["code"] == pytest.approx(sum(code) / len(code), rel=1e-6)
    assert found.domains["docs"] == pytest.approx(sum(docs) / len(docs), rel=1e-6)
    every = code + docs
    assert found.loss == pytest.approx(sum(every) / len(every), rel=1e-6), "by tokens, not domains"


def test_looking_leaves_no_trace(tiny):
    model, _ = tiny("deepseek_v3", policy={"jitter": 0.3, "capacity_factor": 0.5})
    model(torch.arange(8).unsqueeze(0)).logits.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        first = evaluate(model, held_out(), NAMES, nullcontext())
        assert all(module.training is training for module in model.modules())
        assert evaluate(model, held_out(), NAMES, nullcontext()) == first, "jitter is for training"
    assert torch.equal(torch.get_rng_state(), random), "nothing is drawn"
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_capacity_steers_training_only(tiny):
    plain, _ = tiny("qwen3_moe")
    tight, _ = tiny("qwen3_moe", policy={"capacity_factor": 0.1})
    opted, _ = tiny("qwen3_moe", policy={"eval_capacity_factor": 0.1})
    first, second, third = (
        evaluate(model, held_out(), NAMES, nullcontext()).loss for model in (plain, tight, opted)
    )
    assert first == second
    assert first != third


def test_autocast_is_used(tiny):
    model, _ = tiny("qwen3_moe")
    exact = evaluate(model, held_out(), NAMES, nullcontext()).loss
    half = evaluate(model, held_out(), NAMES, torch.autocast("cpu", torch.bfloat16)).loss
    assert exact != half
    assert half == pytest.approx(exact, rel=0.01)


def test_a_mask_of_ones_is_left_out():
    ids = torch.ones(2, 4, dtype=torch.long)
    domains, full = torch.zeros(2), torch.ones(2, 4)
    assert to_micro(Batch(ids, domains, full), torch.device("cpu")).attention_mask is None
    assert to_micro(Batch(ids, domains, None), torch.device("cpu")).attention_mask is None
    padded = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = to_micro(Batch(ids, domains, padded), torch.device("cpu")).attention_mask
    assert torch.equal(found, padded)
