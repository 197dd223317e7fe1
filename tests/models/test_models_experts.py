"""The experts seam and dropout inside the experts."""

import pytest
import torch
from tiny_families import tiny_family

from expertly.errors import ExpertlyError
from expertly.models.experts import (
    EXPERTS,
    add_expert_dropout,
    expert_matrices,
    register_experts,
)
from expertly.models.layers import moe_layers

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
STOCK = ("grouped_mm", "eager")


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_computes_what_the_stock_ones_compute(family, stock, tiny_model, tiny_ids):
    model = tiny_model(family)
    assert model.config._experts_implementation == EXPERTS == register_experts()
    with torch.no_grad():
        ours = model(tiny_ids).logits
    ours_grad = gradients(model, tiny_ids)
    model.set_experts_implementation(stock)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(tiny_ids).logits, atol=1e-5, rtol=1e-4)
    for name, gradient in gradients(model, tiny_ids).items():
        torch.testing.assert_close(ours_grad[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("experts", [EXPERTS, *STOCK])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_there_in_training_only(family, experts, tiny_model, tiny_ids):
    model = tiny_model(family)
    model.set_experts_implementation(experts)
    with torch.no_grad():
        plain = model(tiny_ids).logits
        handles = add_expert_dropout(model, 0.5)
        assert len(handles) == len(moe_layers(model))
        assert model(tiny_ids).logits.equal(plain)
        model.train()
        assert not model(tiny_ids).logits.equal(plain)
        for handle in handles:
            handle.remove()
        assert model(tiny_ids).logits.equal(plain)


def test_dropout_that_no_hook_can_give_is_refused(tiny_model):
    with pytest.raises(ExpertlyError, match="experts of gpt_oss compute") as refusal:
        add_expert_dropout(tiny_model("gpt_oss", max_position_embeddings=4096), 0.5)
    assert refusal.value.code == "E202"


@pytest.mark.parametrize("experts", [EXPERTS, *STOCK])
def test_dropout_preserves_the_expectation(experts, tiny_model):
    model = tiny_model("mixtral").train()
    model.set_experts_implementation(experts)
    module = moe_layers(model)[0].experts
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    draws = 4000
    chosen = torch.tensor([[1, 5]]), torch.tensor([[0.75, 0.25]])
    with torch.no_grad():
        plain = module(x, *chosen)
        add_expert_dropout(model, 0.25)
        torch.manual_seed(0)
        many = module(x.expand(draws, -1), *(each.expand(draws, -1) for each in chosen))
    error = many.std(0) / draws**0.5
    assert ((many.mean(0) - plain[0]).abs() < 5 * error).all()
    assert (many.std(0) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_an_experts_matrices_are_views_of_its_stacks(family, tiny_ids):
    """Concatenated; transposed and interleaved with biases; without a gate."""
    model = tiny_family(family)
    experts = moe_layers(model)[0].experts
    matrices = expert_matrices(experts)
    *_, up, down = matrices
    assert up.shape[0] == down.shape[0] and up.shape[1:] == down.shape[:0:-1]
    assert len(matrices) == (2 if family == "nemotron_h" else 3)
    assert sum(m.numel() for m in matrices) == sum(
        p.numel() for name, p in experts.named_parameters() if p.dim() == 3
    )
    x, one = torch.randn(1, down.shape[1]), torch.ones(1, 1)
    before = experts(x, torch.ones(1, 1, dtype=torch.long), one)
    up[1].zero_()
    zeroed = experts(x, torch.ones(1, 1, dtype=torch.long), one)
    assert not zeroed.equal(before)
    if family != "gpt_oss":  # its gate is multiplied by up + 1
        assert not zeroed.any()
