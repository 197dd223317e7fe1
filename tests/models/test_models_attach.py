"""Attaching a policy: what it changes, what it shows, and that nothing is left after it."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertly.errors import ExpertlyError
from expertly.models.attach import attach, attached, tokens_of
from expertly.models.build import build_model, twin_config
from expertly.models.layers import moe_layers, own_policy
from expertly.moe.capacity import expert_capacity
from expertly.moe.policy import Policy
from expertly.moe.routing import ROUTERS, tokens_per_expert

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
EXPERTS = ("expertly", "grouped_mm", "eager")
FIXED_TOP_K = {"switch_top1": 1, "gshard_top2": 2}

each_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def own(model, **changes):
    return replace(own_policy(model.config.to_dict()), **changes)


@pytest.mark.parametrize("experts", EXPERTS)
@each_family
def test_the_familys_own_rule_changes_no_bit(family, experts, tiny_model, tiny_ids):
    model = tiny_model(family)
    model.set_experts_implementation(experts)
    before = logits_of(model, tiny_ids)
    with attach(model, own(model)):
        assert logits_of(model, tiny_ids).equal(before)
    with attach(model) as looking:
        assert logits_of(model, tiny_ids).equal(before)
        assert len(looking.decisions) == len(moe_layers(model))


@each_family
def test_top_k_is_that_of_a_model_with_this_config(family, tiny_model, tiny_ids):
    model, other = tiny_model(family), tiny_model(family, num_experts_per_tok=3)
    with attach(model, own(model, top_k=3)) as attachment:
        assert logits_of(model, tiny_ids).equal(logits_of(other, tiny_ids))
        assert {d.served.experts.shape for d in attachment.decisions} == {(24, 3)}


@each_family
def test_detaching_leaves_no_hook_and_no_change(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    before, count = logits_of(model, tiny_ids), hooks(model)
    keys = set(model.state_dict())
    attachment = attach(model, own(model, top_k=1, eval_capacity_factor=0.5))
    assert not logits_of(model, tiny_ids).equal(before)
    assert attached(model) is attachment
    attachment.detach()
    assert attached(model) is None
    assert hooks(model) == count
    assert set(model.state_dict()) == keys
    assert logits_of(model, tiny_ids).equal(before)


def test_a_later_policy_overrules_until_it_is_detached(tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    with attach(model, own(model, top_k=1)) as first:
        one = logits_of(model, tiny_ids)
        with attach(model, own(model, top_k=4)) as second:
            assert attached(model) is second
            assert not logits_of(model, tiny_ids).equal(one)
        assert attached(model) is first
        assert logits_of(model, tiny_ids).equal(one)


@pytest.mark.parametrize("order", ["looks last", "looks first"])
def test_one_that_only_looks_sees_what_the_policy_at_work_dropped(order, tiny_model, tiny_ids):
    model = tiny_model("mixtral").train()
    policy = Policy(router="gshard_top2", top_k=2, capacity_factor=0.5)
    early = attach(model) if order == "looks first" else None
    with attach(model, policy) as at_work:
        looking = early or attach(model)
        logits_of(model, tiny_ids)
        assert looking.rule == "gshard_top2"
        for seen, made in zip(looking.decisions, at_work.decisions, strict=True):
            assert seen is made
            assert not seen.served.kept.all()
    logits_of(model, tiny_ids)
    assert looking.rule == own(model).router
    assert all(d.served.kept is None for d in looking.decisions)


@pytest.mark.parametrize("policy", [True, False])
def test_decisions_before_a_forward_say_what_to_do(policy, tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    with attach(model, own(model) if policy else None) as attachment:
        with pytest.raises(ValueError, match="call the model itself first"):
            attachment.decisions  # noqa: B018
        with pytest.raises(IndexError):
            model(tiny_ids + 10_000)
        with pytest.raises(ValueError, match="call the model itself first"):
            attachment.decisions  # noqa: B018
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model()


def test_a_router_that_did_not_run_is_unseen(tiny_model, tiny_ids):
    model = copy.deepcopy(tiny_model("mixtral"))
    with attach(model) as attachment:
        assert attachment.unseen() == "model.layers.0.mlp", "none has run yet"
        model(tiny_ids)
        assert attachment.unseen() is None
        model.model.layers[1].mlp.forward = lambda x: x
        model(tiny_ids)
        assert attachment.unseen() == "model.layers.1.mlp"


def test_a_part_of_a_model_never_sees_a_stale_mask(tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    with attach(model, own(model, eval_capacity_factor=1.0)) as attachment:
        for before in (lambda: None, lambda: logits_of(model, tiny_ids)):
            before()
            with pytest.raises(ValueError, match="call the model, not a part of it"):
                model.model(tiny_ids)
        assert len(attachment.tokens.valid) == tiny_ids.numel(), "it can still be read"
        model(tiny_ids)  # with gradients, backward may need the mask
        with pytest.raises(ValueError, match="call the model, not a part of it"):
            model.model(tiny_ids[:1])
    model.model(tiny_ids)


def test_an_error_inside_the_forward_still_leaves_cleanly(tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    count = hooks(model)
    with pytest.raises(IndexError), attach(model, own(model)):
        model(tiny_ids + 10_000)
    assert hooks(model) == count


@each_family
@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"expert_choice"}))
def test_every_router_works_on_every_family(family, router, tiny_model, tiny_ids):
    model = tiny_model(family).train()
    # a tolerance for all: by its own only near ties have a gradient
    options = {"tolerance": 1.0} if router == "sparsemixer" else {}
    policy = Policy(router=router, top_k=FIXED_TOP_K.get(router, 2), options=options)
    with attach(model, policy) as attachment:
        assert attachment.rule == router
        loss = model(tiny_ids, labels=tiny_ids).loss
        loss.backward()
        assert loss.isfinite()
        assert all(layer.router.weight.grad.any() for layer in attachment.layers)
        assert (attachment.biases() is None) == (not ROUTERS[router].biased)
        for decision in attachment.decisions:
            scores = ROUTERS[router].score(decision.chosen.logits)
            assert scores.shape == (24, 8)


@each_family
def test_a_bias_moves_the_choice(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    with attach(model, Policy(router="biased_sigmoid_topk", top_k=2)) as attachment:
        for bias in attachment.bias:
            bias.zero_()[3] = 100.0
        logits_of(model, tiny_ids)
        assert all((d.served.experts == 3).any(-1).all() for d in attachment.decisions)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        pytest.param(Policy(router="expert_choice", top_k=2), "later tokens", id="looks ahead"),
        pytest.param(Policy(router="softmax_topk", top_k=9), "9 with 8", id="too many"),
        pytest.param(Policy(router="nope", top_k=2), "no such router", id="unknown"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(policy, why, tiny_model):
    model = tiny_model("mixtral")
    with pytest.raises(ExpertlyError, match=why) as error:
        attach(model, policy)
    assert error.value.code == "E204"
    assert hooks(model) == 0


def test_a_model_without_experts_is_refused(tiny_model):
    model = AutoModelForCausalLM.from_config(twin_config(tiny_model("qwen3_moe").config))
    with pytest.raises(ExpertlyError) as error:
        attach(model)
    assert error.value.code == "E306"
    with pytest.raises(ExpertlyError) as error:
        attach(build_model(twin_config(tiny_model("deepseek_v3").config)))
    assert error.value.code == "E305"


# --- Capacity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@each_family
def test_capacity_holds_in_training_only(family, overflow, tiny_model, tiny_ids):
    model = tiny_model(family)
    plain = logits_of(model, tiny_ids)
    policy = own(model, capacity_factor=1.0, overflow=overflow)
    capacity = expert_capacity(24, 2, 8, 1.0)
    with attach(model, policy) as attachment:
        assert logits_of(model, tiny_ids).equal(plain)
        logits_of(model.train(), tiny_ids)
        for decision in attachment.decisions:
            served = decision.served
            assert tokens_per_expert(decision.chosen).max() > capacity, "nothing overflowed"
            assert tokens_per_expert(served).max() <= capacity
            assert (served.weights[~served.kept] == 0).all()
            if overflow == "reroute":
                lost = int((~served.kept).sum())
                assert lost < int((tokens_per_expert(decision.chosen) - capacity).clamp(0).sum())


@each_family
def test_eval_capacity_holds_in_evaluation_only(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    plain = logits_of(model, tiny_ids)
    with attach(model, own(model, eval_capacity_factor=0.5)) as attachment:
        assert not logits_of(model, tiny_ids).equal(plain)
        assert all(tokens_per_expert(d.served).max() <= 3 for d in attachment.decisions)
        assert logits_of(model.train(), tiny_ids).equal(plain)


@pytest.mark.parametrize("experts", EXPERTS)
def test_what_was_dropped_adds_nothing(experts, tiny_model, tiny_ids):
    model = tiny_model("mixtral").train()
    model.set_experts_implementation(experts)
    out = {}
    layer = moe_layers(model)[0]
    layer.experts.register_forward_hook(lambda m, args, output: out.update(y=output))
    with attach(model, own(model, capacity_factor=0.25)) as attachment:
        logits_of(model, tiny_ids)
    kept = attachment.decisions[0].served.kept.any(-1)
    assert not kept.all()
    assert (out["y"][~kept] == 0).all()
    assert (out["y"][kept] != 0).any(-1).all()


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("side", ["left", "right"])
@each_family
def test_padding_changes_no_valid_position(family, side, factor, tiny_model, tiny_ids):
    model = tiny_model(family)
    row = tiny_ids[:1]
    pad = torch.full((1, 5), 7)
    ids = torch.cat([pad, row] if side == "left" else [row, pad], dim=1)
    mask = torch.cat([pad * 0, row * 0 + 1] if side == "left" else [row * 0 + 1, pad * 0], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(model, own(model, eval_capacity_factor=factor)) as attachment:
        alone = logits_of(model, row)
        padded = logits_of(model, ids, attention_mask=mask, position_ids=places)
        assert attachment.tokens.valid.equal(mask[0].bool())
        assert len(attachment.tokens.sequence_id[attachment.tokens.valid].unique()) == 1
    torch.testing.assert_close(padded[mask.bool()], alone[0], atol=1e-5, rtol=1e-4)


# --- What is seen ------------------------------------------------------------------------------


@each_family
def test_decisions_are_what_a_plain_hook_sees(family, tiny_model, tiny_ids):
    model = tiny_model(family).train()
    seen = []
    with attach(model, own(model, capacity_factor=0.75)) as attachment:
        for layer in attachment.layers:
            layer.router.register_forward_hook(lambda m, args, output: seen.append(output))
        logits_of(model, tiny_ids)
        assert len(seen) == len(attachment.decisions)
        for decision, output in zip(attachment.decisions, seen, strict=True):
            assert all(a is b for a, b in zip(decision.served[:3], output, strict=True))


def test_output_router_logits_are_the_decisions(tiny_model, tiny_ids):
    model = tiny_model("qwen3_moe")
    with attach(model, own(model)) as attachment:
        said = model(tiny_ids, output_router_logits=True).router_logits
        for logits, decision in zip(said, attachment.decisions, strict=True):
            assert logits.equal(decision.chosen.logits)


@each_family
def test_logits_are_float32_under_autocast(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    with attach(model, own(model)) as attachment, torch.autocast("cpu", torch.bfloat16):
        logits_of(model, tiny_ids)
    assert {d.chosen.logits.dtype for d in attachment.decisions} == {torch.float32}
    assert {d.served.weights.dtype for d in attachment.decisions} == {torch.float32}


@pytest.mark.parametrize("router", ["own", "gshard_top2"])
@each_family
def test_checkpointed_activations_decide_once_and_give_the_same_gradient(
    family, router, tiny_model, tiny_ids
):
    def gradients(checkpointed: bool):
        model = tiny_model(family).train()
        if checkpointed:
            kind = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        calls = []
        policy = own(model, jitter=0.1, capacity_factor=1.0)
        if router != "own":
            policy = Policy(router=router, top_k=2)
        with attach(model, policy) as attachment:
            moe_layers(model)[0].router.register_forward_hook(lambda *_: calls.append(1))
            torch.manual_seed(7)
            loss = model(tiny_ids, labels=tiny_ids, use_cache=False).loss
            decisions = attachment.decisions
            aux = sum(d.chosen.logits.logsumexp(-1).square().mean() for d in decisions)
            (loss + 0.1 * aux).backward()
            assert all(a is b for a, b in zip(decisions, attachment.decisions, strict=True))
        assert len(calls) == 1 + checkpointed, "the forward was not run again in backward"
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


# --- Tokens ------------------------------------------------------------------------------------


def test_rows_are_sequences():
    tokens = tokens_of(torch.zeros(2, 3, dtype=torch.long))
    assert tokens.valid.all()
    assert tokens.sequence_id.tolist() == [0, 0, 0, 1, 1, 1]


def test_embeddings_count_as_tokens():
    assert len(tokens_of(inputs_embeds=torch.zeros(2, 3, 8)).valid) == 6


def test_position_ids_that_start_again_begin_a_sequence():
    places = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 0]])
    tokens = tokens_of(torch.zeros(2, 5, dtype=torch.long), None, places)
    assert tokens.sequence_id.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_decoding_sees_the_masks_last_columns():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    tokens = tokens_of(torch.zeros(2, 1, dtype=torch.long), mask)
    assert tokens.valid.tolist() == [True, True]
    tokens = tokens_of(torch.zeros(2, 3, dtype=torch.long), mask)
    assert tokens.valid.tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 3, 3), {"full_attention": None}])
def test_masks_that_say_nothing_about_tokens_are_left_alone(mask):
    assert tokens_of(torch.zeros(1, 3, dtype=torch.long), mask).valid.all()


@each_family
def test_generate_follows_the_policy(family, tiny_model, tiny_ids):
    model = tiny_model(family)
    with attach(model, own(model, top_k=1)):
        made = model.generate(
            tiny_ids[:1, :4], attention_mask=torch.ones(1, 4), max_new_tokens=6, do_sample=False
        )
        slow = tiny_ids[:1, :4]
        while slow.shape[1] < made.shape[1]:
            following = logits_of(model, slow)[:, -1].argmax(-1, keepdim=True)
            slow = torch.cat([slow, following], dim=1)
    assert made.equal(slow)


# --- Moving and copying ------------------------------------------------------------------------


def test_a_copied_model_follows_a_copy_of_the_policy(tiny_model, tiny_ids):
    model = tiny_model("mixtral")
    plain = logits_of(model, tiny_ids)
    with attach(model, own(model, top_k=1)) as attachment:
        one = logits_of(model, tiny_ids)
        other = copy.deepcopy(model)
    assert attached(other) not in (None, attachment)
    assert logits_of(other, tiny_ids).equal(one)
    attached(other).detach()
    assert logits_of(other, tiny_ids).equal(plain)


def test_the_bias_is_the_modules_own_even_after_the_model_moved(tiny_model, tiny_ids):
    model = tiny_model("deepseek_v3")
    with attach(model, own(model)) as attachment:
        model.double()
        attachment.bias[0].fill_(0.5)
        assert (attachment.layers[0].router.e_score_correction_bias == 0.5).all()
        logits_of(model, tiny_ids)


def test_a_bias_in_bfloat16_becomes_float32(tiny_model):
    model = tiny_model("deepseek_v3").bfloat16()
    with attach(model, own(model)) as attachment:
        assert {bias.dtype for bias in attachment.bias} == {torch.float32}
        bias = attachment.layers[0].router.e_score_correction_bias
        assert bias is attachment.bias[0]
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()


def test_detaching_puts_a_biases_dtype_back_unless_that_loses_something(tiny_model, tiny_ids):
    model = tiny_model("deepseek_v3").bfloat16()
    router = moe_layers(model)[0].router
    before, tensor = logits_of(model, tiny_ids), router.e_score_correction_bias
    with attach(model, own(model)), attach(model, own(model, top_k=1)):
        assert router.e_score_correction_bias.dtype == torch.float32
    assert router.e_score_correction_bias is tensor
    assert {b.dtype for b in model.buffers() if len(b) == 8} == {torch.bfloat16}
    assert logits_of(model, tiny_ids).equal(before)
    with attach(model, own(model)) as attachment:
        attachment.bias[0].fill_(0.001)  # not a number of bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert (router.e_score_correction_bias == 0.001).all()
    assert moe_layers(model)[1].router.e_score_correction_bias.dtype == torch.bfloat16


def test_detaching_leaves_a_float32_bias_alone(tiny_model):
    model = tiny_model("deepseek_v3")
    with attach(model, own(model)):
        model.bfloat16()
    assert moe_layers(model)[0].router.e_score_correction_bias.dtype == torch.bfloat16
