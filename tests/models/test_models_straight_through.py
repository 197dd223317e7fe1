"""Straight-through routers: the sparse forward to the bit, the dense mixture's router gradient."""

import copy

import pytest
import torch
from tiny_families import tiny_family

from expertly.errors import ExpertlyError
from expertly.models.attach import attach
from expertly.models.layers import own_policy
from expertly.models.straight_through import (
    StraightThrough,
    check_straight_through,
    dense_gates,
)
from expertly.moe.policy import Policy

FAMILIES = {
    "mixtral": {},
    "qwen3_moe": {"extra": {"norm_topk_prob": True}},
    "qwen3_moe, as they are": {"extra": {"norm_topk_prob": False}},
    "olmoe": {},
    "deepseek_v3": {},
}


def made(tiny_model, name, **sizes):
    """A model in training mode with its own policy attached, and its attachment."""
    model = tiny_model(name.partition(",")[0], **FAMILIES.get(name, {}).get("extra", {}), **sizes)
    model.train()
    return model, attach(model, own_policy(model.config.to_dict()))


def gradients(model, ids, **more):
    """The logits, and every parameter's gradient."""
    model.zero_grad()
    found = model(ids, labels=ids, **more)
    found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found.logits.detach(), grads


def slow_dense(attachment):
    """The paper's formula in so many words: y = sparse + dense - detached dense, all in autograd.

    An expert that a token does not use answers without a gradient of its own.
    """
    seen = {}

    def router(index, module, args, output):
        seen[index] = output[0]

    def experts(index, module, args, output):
        x, chosen, weights = args
        scores = torch.sigmoid if attachment.rule == "biased_sigmoid_topk" else _softmax
        probs, dense = scores(seen[index]), 0
        for expert in range(probs.shape[-1]):
            mine = (chosen == expert) & (weights != 0)
            used, live = mine.any(dim=-1, keepdim=True), (weights * mine).sum(-1, keepdim=True)
            answer = module.forward(
                x, torch.full((len(x), 1), expert, dtype=chosen.dtype), torch.ones(len(x), 1)
            )
            answer = torch.where(used, answer, answer.detach())
            norm = (probs.gather(-1, chosen) / weights)[:, :1].detach()
            dense = dense + answer * torch.where(used, live, probs[:, expert, None] / norm)
        return output.detach() + dense - dense.detach()

    for index, layer in enumerate(attachment.layers):
        layer.router.register_forward_hook(lambda *a, i=index: router(i, *a))
        layer.experts.register_forward_hook(lambda *a, i=index: experts(i, *a))


def _softmax(logits):
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_gradient_is_the_dense_mixtures(name, tiny_model, tiny_ids):
    model, attachment = made(tiny_model, name)
    plain, sparse = gradients(model, tiny_ids)
    slow, slow_attachment = made(tiny_model, name)
    slow_dense(slow_attachment)
    StraightThrough(model.config.to_dict(), attachment)
    logits, ours = gradients(model, tiny_ids)
    assert logits.equal(plain), "to the bit"
    _, theirs = gradients(slow, tiny_ids)
    assert ours.keys() == theirs.keys() == sparse.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, atol=2e-5, rtol=1e-3, msg=key)
    router = next(key for key in ours if key.endswith("mlp.gate.weight"))
    assert (ours[router] - sparse[router]).norm() > 0.05 * sparse[router].norm()


def test_experts_learn_from_their_own_tokens_only(tiny_model, tiny_ids):
    """With one layer: in others the hidden gradient differs by what routers above have learnt."""
    model, attachment = made(tiny_model, "mixtral", num_hidden_layers=1)
    _, sparse = gradients(model, tiny_ids)
    mixed = StraightThrough(model.config.to_dict(), attachment)
    _, dense = gradients(model, tiny_ids)
    for name, gradient in dense.items():
        if ".experts." in name or "lm_head" in name:
            assert gradient.equal(sparse[name]), name
    assert not dense["model.layers.0.mlp.gate.weight"].equal(
        sparse["model.layers.0.mlp.gate.weight"]
    )
    mixed.detach()
    _, again = gradients(model, tiny_ids)
    assert all(again[name].equal(gradient) for name, gradient in sparse.items())


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "qwen2_moe"])
def test_other_layouts_and_shared_experts(family, tiny_ids):
    """Transposed and interleaved weights, biases; and a block that adds to the output in place."""
    model = tiny_family(family).train()
    attachment = attach(model, own_policy(model.config.to_dict()))
    slow = copy.deepcopy(model)
    slow_dense(attach(slow, own_policy(slow.config.to_dict())))
    with torch.no_grad():
        plain = model(tiny_ids).logits
    StraightThrough(model.config.to_dict(), attachment)
    logits, ours = gradients(model, tiny_ids)
    assert logits.equal(plain)
    _, theirs = gradients(slow, tiny_ids)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


def test_checkpointing_padding_and_autocast(tiny_model, tiny_ids):
    mask = torch.ones_like(tiny_ids)
    mask[0, 8:] = 0
    model, attachment = made(tiny_model, "qwen3_moe")
    StraightThrough(model.config.to_dict(), attachment)
    _, plain = gradients(model, tiny_ids, attention_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        loss = model(tiny_ids, labels=tiny_ids, attention_mask=mask).loss
    loss.backward()  # outside: backward enters it again
    for name, parameter in model.named_parameters():
        # a rounded router chooses other experts here and there
        assert (parameter.grad - plain[name]).norm() < 0.5 * plain[name].norm(), name
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = gradients(model, tiny_ids, attention_mask=mask)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_evaluation_and_dropout_are_left_alone(tiny_model, tiny_ids):
    from expertly.models.experts import add_expert_dropout

    model, attachment = made(tiny_model, "mixtral")
    add_expert_dropout(model, 0.5)
    mixed = StraightThrough(model.config.to_dict(), attachment)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        gradients(model, tiny_ids)
        draws.append(torch.rand(1))
        mixed.detach()
    assert draws[0] == draws[1], "backward draws nothing"
    assert all(module.training for module in model.modules())
    StraightThrough(model.config.to_dict(), attachment)
    with torch.no_grad():
        model(tiny_ids)
    model.eval()(tiny_ids).logits.sum().backward()


def test_what_capacity_dropped_counts_as_unused():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], requires_grad=True)
    chosen, probs = torch.tensor([[0, 1], [1, 2]]), logits.softmax(-1)
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    gates = dense_gates("softmax_topk", logits, chosen, weights)
    torch.testing.assert_close(gates[0], probs[0] * 0.5 / probs[0, 0].detach())
    assert not gates[1].any(), "a token that lost everything has no scale"


def test_a_run_with_capacity(tiny_model, tiny_ids):
    model, attachment = made(tiny_model, "mixtral")
    attachment.detach()
    attachment = attach(model, Policy(router="softmax_topk", top_k=2, capacity_factor=0.5))
    plain, _ = gradients(model, tiny_ids)
    StraightThrough(model.config.to_dict(), attachment)
    logits, grads = gradients(model, tiny_ids)
    assert logits.equal(plain)
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize(
    ("family", "rule", "why"),
    [
        ("phimoe", "sparsemixer", "another softmax"),
        ("llama4_text", "topk_sigmoid", "not handed a weight"),
        ("switch_transformers", "switch_top1", "not handed a weight"),
    ],
)
def test_what_knows_no_dense_mixture_is_refused(family, rule, why):
    with pytest.raises(ExpertlyError, match=f"E204.*router.straight_through.*{why}") as refusal:
        check_straight_through({"model_type": family}, rule)
    assert "\n" not in str(refusal.value)


def test_packed_experts_are_refused(tiny_model):
    model, attachment = made(tiny_model, "mixtral")
    attachment.layers[1].experts.packed = torch.nn.Identity()
    with pytest.raises(ExpertlyError, match=r"E204.*packed experts are not trained"):
        StraightThrough(model.config.to_dict(), attachment)
