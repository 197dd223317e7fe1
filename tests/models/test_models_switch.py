"""Switch Transformers: watched as it is, limited, and steered by no other rule than its own."""

from dataclasses import replace

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from expertly.errors import ExpertlyError
from expertly.models.attach import attach
from expertly.models.build import model_config
from expertly.models.layers import moe_layers, own_policy
from expertly.models.loading import open_model
from expertly.models.probe import OutputProbe
from expertly.moe.capacity import expert_capacity
from expertly.moe.policy import Policy
from expertly.moe.routing import tokens_per_expert
from expertly.watch import Watch

LAYERS = ["encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp"]
ROOMY, TIGHT = 64, 2  # its own capacity, per sequence


def switch(expert_capacity=ROOMY):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=300,
        d_model=32,
        d_kv=8,
        d_ff=16,
        num_layers=4,
        num_decoder_layers=2,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=8,
        expert_capacity=expert_capacity,
    )
    return SwitchTransformersForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def asked(tiny_ids):
    """Twelve tokens to read, and seven that are written, in two rows."""
    return {"input_ids": tiny_ids, "decoder_input_ids": tiny_ids[:, :7]}


@torch.no_grad()
def logits_of(model, asked):
    return model(**asked).logits


def own(model, **changes):
    return replace(own_policy(model.config.to_dict()), **changes)


@pytest.mark.parametrize("capacity", [ROOMY, TIGHT])
def test_its_own_rule_changes_no_bit_and_its_own_capacity_goes_on(capacity, asked):
    model = switch(capacity)
    before = logits_of(model, asked)
    with attach(model) as looking:
        assert logits_of(model, asked).equal(before)
    with attach(model, own(model)) as steering:
        assert logits_of(model, asked).equal(before)
    assert [layer.name for layer in moe_layers(model)] == [*LAYERS, "decoder.block.1.layer.2.mlp"]
    assert [len(d.served.experts) for d in looking.decisions] == [24, 24, 14]
    for seen, made in zip(looking.decisions, steering.decisions, strict=True):
        pairs = zip(seen.served, made.served, strict=True)
        assert all(theirs.equal(ours) for theirs, ours in pairs)
        assert made.served.kept.all() == (capacity == ROOMY)


def test_a_capacity_of_ours_comes_on_top(asked):
    model = switch(TIGHT)
    with attach(model, own(model, eval_capacity_factor=1.0)) as attachment:
        assert logits_of(model, asked).isfinite().all()
    for decision, tokens in zip(attachment.decisions, (24, 24, 14), strict=True):
        served = tokens_per_expert(decision.served)
        assert served.max() <= min(expert_capacity(tokens, 1, 8, 1.0), 2 * TIGHT)
        assert (served <= tokens_per_expert(decision.chosen)).all()


def test_padding_on_either_side_takes_no_room(asked):
    model = switch()
    masks = {key: torch.ones_like(asked[ids]) for key, ids in zip(MASKS, asked, strict=True)}
    masks["attention_mask"][1, 5:] = 0
    masks["decoder_attention_mask"][0, 3:] = 0
    with attach(model, own(model, eval_capacity_factor=8.0)) as attachment:
        logits_of(model, {**asked, **masks})
    kept = [decision.served.kept.flatten() for decision in attachment.decisions]
    for served, mask in zip(kept, [masks[key] for key in (MASKS[0], *MASKS)], strict=True):
        assert served.equal(mask.flatten().bool())


MASKS = ("attention_mask", "decoder_attention_mask")


def test_labels_are_what_the_decoder_reads(tiny_ids):
    model = switch()
    model.config.decoder_start_token_id = 0
    with attach(model, own(model)) as attachment, torch.no_grad():
        model(input_ids=tiny_ids, labels=tiny_ids[:, :5].contiguous())
    assert [len(d.served.experts) for d in attachment.decisions] == [24, 24, 10]


def test_what_both_sides_read_may_be_given_in_any_way(asked):
    model = switch()
    ids, inner = asked.values()
    ones, embed = torch.ones_like(ids), model.get_input_embeddings()
    before = logits_of(model, asked)
    with attach(model, own(model)) as attachment, torch.no_grad():
        assert model(ids, ones, inner).logits.equal(before)
        assert len(attachment.decisions) == 3
        assert model(inputs_embeds=embed(ids), decoder_inputs_embeds=embed(inner)).logits.equal(
            before
        )
    assert [len(tokens.valid) for tokens in attachment.tokens_by_layer] == [24, 24, 14]


@pytest.mark.parametrize("policy", [False, True])
def test_generating_is_as_without_and_the_encoder_outside_the_forward_is_not_seen(policy, tiny_ids):
    model = switch()
    mask = torch.ones_like(tiny_ids)
    mask[1, 5:] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": 299}
    how["decoder_start_token_id"] = 0
    before = model.generate(tiny_ids, **how)
    with attach(model, own(model) if policy else None) as attachment:
        assert model.generate(tiny_ids, **how).equal(before)
    assert attachment.unseen() == LAYERS[0]
    assert attachment.tokens is None and len(attachment.tokens_by_layer) == 1
    with pytest.raises(ValueError, match="no decisions yet"):
        attachment.decisions  # noqa: B018


def test_padding_takes_no_room_in_an_encoder_called_by_itself(tiny_ids):
    model = switch()
    ids, mask = torch.cat([tiny_ids, tiny_ids], 1), torch.ones(2, 24)
    mask[:, 12:] = 0
    with torch.no_grad(), attach(model, own(model, eval_capacity_factor=1.0)):
        alone = model.encoder(input_ids=tiny_ids).last_hidden_state
        padded = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(padded[:, :12], alone)


def test_it_is_opened_with_transformers(tmp_path):
    switch().save_pretrained(tmp_path)
    with pytest.raises(ExpertlyError, match=r"E306\].*an encoder-decoder. FIX: open it with trans"):
        open_model(tmp_path)


def test_its_experts_answers_are_those_by_hand(asked):
    model = switch()
    probe, calls = OutputProbe(model), []
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
    probe.arm()
    logits_of(model, asked)
    norms = probe.read()
    for row, (experts, (hidden, chosen, _)) in zip(norms, calls, strict=True):
        for expert, found in enumerate(row):
            mine = hidden[chosen[:, 0, expert].bool()]
            if len(mine) == 0:
                assert found.isnan()
                continue
            each = experts[f"expert_{expert}"](mine).norm(dim=-1)
            assert each.min() * 0.999 <= found <= each.max() * 1.001


@pytest.mark.parametrize(
    "policy",
    [
        Policy(router="softmax_topk", top_k=2),
        Policy(router="softmax_topk", top_k=1),  # renormalised: every weight would be 1
        Policy(router="biased_sigmoid_topk", top_k=1),
    ],
)
def test_another_rule_is_refused_with_the_reason(policy):
    with pytest.raises(ExpertlyError, match="its experts take one expert per token") as refusal:
        attach(switch(), policy)
    assert refusal.value.code == "E204"


def test_the_same_rule_by_another_name_is_not_refused(asked):
    model = switch()
    before = logits_of(model, asked)
    policy = Policy(router="softmax_topk", top_k=1, options={"renormalize": False})
    with attach(model, policy):
        assert logits_of(model, asked).equal(before)


def test_it_is_not_built_from_sizes():
    with pytest.raises(ExpertlyError, match="an encoder-decoder, which can be watched") as refusal:
        model_config("switch_transformers", {"num_experts": 4})
    assert refusal.value.code == "E306"


def test_its_health_is_read_though_encoder_and_decoder_see_different_tokens(asked):
    model = switch()
    with Watch(model) as health:
        logits_of(model, asked)
        watched = health.read()
    assert health.counts.tokens.tolist() == [24, 24, 14]
    assert health.counts.load.sum(-1).tolist() == [24, 24, 14]
    assert watched["dropped_frac"] == 0
    assert watched["aux_loss_per_k"] >= 0.9


def test_health_of_generating_alone_is_refused_not_guessed(tiny_ids):
    model = switch()
    with Watch(model) as health:
        model.generate(tiny_ids, max_new_tokens=2, decoder_start_token_id=0)
        with pytest.raises(ExpertlyError, match=r"E504\] encoder.block.1.layer.1.mlp: its"):
            health.read()
