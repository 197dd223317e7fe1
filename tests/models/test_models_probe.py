"""The output probe against running each expert by hand; and that looking changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import set_checkpoint_early_stop

from expertly.models.experts import add_expert_dropout, register_experts
from expertly.models.layers import moe_layers
from expertly.models.probe import OutputProbe, sample

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")


def by_hand(experts, x, expert):
    """One expert on tokens (tokens, dim), from its own weights: transformers' gated layout."""
    gate, up = F.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def seen_by_experts(model, ids, **kwargs):
    """What every experts module was given in a forward."""
    calls = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda module, args: calls.append(args))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(ids, **kwargs)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("implementation", ["eager", "expertly"])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_each_experts_own_tokens(family, implementation, tiny_model, tiny_ids):
    register_experts()
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    mask = torch.ones_like(tiny_ids)
    mask[:, 2:] = 0  # so few tokens that some experts get none
    probe = OutputProbe(model)
    probe.arm()
    with torch.no_grad():
        model(tiny_ids, attention_mask=mask)
    norms = probe.read()
    calls = seen_by_experts(model, tiny_ids, attention_mask=mask)
    valid = mask.flatten().bool()
    for index, (layer, (hidden, chosen, _)) in enumerate(
        zip(moe_layers(model), calls, strict=True)
    ):
        for expert in range(layer.num_experts):
            mine = hidden[(chosen == expert).any(-1) & valid]
            if len(mine) == 0:
                assert norms[index, expert].isnan()
                continue
            each = by_hand(layer.experts, mine, expert).norm(dim=-1)
            assert each.min() * 0.999 <= norms[index, expert] <= each.max() * 1.001
            if len(mine) <= 4:
                torch.testing.assert_close(norms[index, expert], each.mean())
    assert norms.shape == (len(moe_layers(model)), 8)
    assert norms.isnan().any(), "or that was not tried"


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 3), st.integers(3, 6))
def test_a_sample_is_of_the_experts_own_valid_tokens(seed, tokens, top_k, num_experts):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    valid = torch.rand(tokens, generator=generator) < 0.7
    token, there = sample(chosen, valid, num_experts)
    for expert in range(num_experts):
        mine = {t for t in range(tokens) if valid[t] and expert in chosen[t]}
        drawn = token[expert][there[expert]].tolist()
        assert set(drawn) <= mine and len(set(drawn)) == len(drawn) == min(4, len(mine))


def test_a_silenced_expert_is_silent(tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    moe_layers(model)[1].experts.down_proj.data[3] = 0
    probe = OutputProbe(model)
    for _ in range(2):
        probe.arm()
        model(tiny_ids)
    norms = probe.read()
    assert norms[1, 3] == 0 and (norms[0] > 0).all() and (norms[1] > 0).sum() == 7


def trained(model, ids, watched, *, autocast, checkpointing):
    """Gradients and random state after one step of training with expert dropout."""
    model = copy.deepcopy(model).train()
    add_expert_dropout(model, 0.3)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probe = OutputProbe(model) if watched else None
    if probe:
        probe.arm()
    torch.manual_seed(5)
    # without early stop recomputation runs to the end of each layer, its hooks included
    whole = set_checkpoint_early_stop(False)
    with whole, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    first = probe.read() if probe else None
    loss.backward()
    if probe:
        assert first.shape == (2, 8) and not first.requires_grad
        assert probe.read() is None, "recomputation is not another look"
        assert all(module.training for module in model.modules())
    return [p.grad for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_looking_changes_nothing_to_the_bit(autocast, checkpointing, tiny_model, tiny_ids):
    runs = [
        trained(
            tiny_model("qwen3_moe"),
            tiny_ids,
            watched,
            autocast=autocast,
            checkpointing=checkpointing,
        )
        for watched in (True, False)
    ]
    (grads, state), (alone, state_alone) = runs
    assert torch.equal(state, state_alone)
    assert any(grad is not None and grad.any() for grad in grads)
    for a, b in zip(grads, alone, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_only_an_armed_forward_is_looked_at_and_no_hook_stays(tiny_model, tiny_ids):
    model = tiny_model("olmoe")
    before = hooks(model)
    probe = OutputProbe(model)
    model(tiny_ids)
    assert probe.read() is None
    probe.arm()
    model(tiny_ids)
    once = probe.read()
    model(tiny_ids)
    assert once is not None and probe.read() is None
    probe.detach()
    assert hooks(model) == before


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
