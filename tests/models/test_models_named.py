"""Every named family, on a tiny random model: read, steered, limited, trained, saved, twinned."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES, moe_layer_indices, sizes
from expertly.folders import save_folder
from expertly.models.attach import attach
from expertly.models.build import build_model, model_config, twin_config
from expertly.models.inspect import inspect_folder, part_of
from expertly.models.layers import moe_layers, own_policy, selection_bias
from expertly.models.loading import open_model, save_model
from expertly.models.policies import POLICY, stock_form
from expertly.models.probe import OutputProbe
from expertly.moe.capacity import expert_capacity
from expertly.moe.policy import Policy
from expertly.moe.routing import tokens_per_expert
from expertly.train.config import RouterConfig
from expertly.train.step import MicroBatch, accumulate
from expertly.watch.recorder import count_decisions
from expertly.watch.stats import watch_set

DENSE_FIRST = {"num_hidden_layers": 3, "num_shared_experts": 1, "intermediate_size": 48}
LATENT = {
    **DENSE_FIRST,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
HEADS = {"head_dim": 8}
SHARED = {"shared_expert_intermediate_size": 24}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# what each needs besides the sizes that all have
NAMED = {
    "qwen2_moe": SHARED,
    "deepseek_v2": LATENT,
    "gpt_oss": {**HEADS, "max_position_embeddings": 4096},
    "granitemoe": {},
    "glm4_moe": {**DENSE_FIRST, **HEADS},
    "ernie4_5_moe": DENSE_FIRST,
    "phimoe": {"router_jitter_noise": 0.2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": {**HEADS, **SHARED, **LINEAR, "num_hidden_layers": 4},
    "hunyuan_v1_moe": HEADS,
    "dots1": DENSE_FIRST,
    "flex_olmo": {},
    "minimax_m2": HEADS,
    "llama4_text": HEADS,
}
EXPERTS = ("expertly", "grouped_mm", "eager")
FIXED_TOP_K = ("phimoe",)
SOFTMAX = ("qwen2_moe", "qwen3_next", "flex_olmo", "hunyuan_v1_moe")  # can say renormalized
BIASED = [name for name in NAMED if FAMILIES[name].bias]

each_family = pytest.mark.parametrize("family", NAMED)


@pytest.fixture(scope="session")
def tiny(tiny_sizes):
    """tiny(family, **sizes) -> a random model in evaluation mode, with a selection bias."""

    def make(family: str, **sizes):
        torch.manual_seed(0)
        config = model_config(family, {**tiny_sizes(family), **NAMED[family], **sizes})
        model = build_model(config).eval()
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
        return model

    return make


def switchable(family: str) -> bool:
    return family != "llama4_text"  # its experts take no list of chosen ones


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def own(model, **changes):
    return replace(own_policy(model.config.to_dict()), **changes)


@each_family
def test_the_familys_own_rule_changes_no_bit(family, tiny, tiny_ids):
    model = tiny(family)
    assert len(moe_layers(model)) == len(moe_layer_indices(model.config.to_dict())) > 0
    for experts in EXPERTS if switchable(family) else EXPERTS[:1]:
        if switchable(family):
            model.set_experts_implementation(experts)
        before = logits_of(model, tiny_ids)
        with attach(model) as looking:
            assert logits_of(model, tiny_ids).equal(before)
        with attach(model, own(model)) as steering:
            assert logits_of(model, tiny_ids).equal(before)
        for seen, made in zip(looking.decisions, steering.decisions, strict=True):
            assert seen.served.experts.sort(-1).values.equal(made.served.experts.sort(-1).values)
            torch.testing.assert_close(seen.served.logits, made.served.logits)


@pytest.mark.parametrize("family", [name for name in NAMED if name not in FIXED_TOP_K])
def test_top_k_is_that_of_a_model_with_this_config(family, tiny, tiny_ids):
    model = tiny(family)
    width = FAMILIES[family].dense_width  # from scratch it would follow the top_k
    kept = {width: model.config.to_dict()[width]} if hasattr(model.config, width) else {}
    other = tiny(family, num_experts_per_tok=3, **kept)
    with attach(model, own(model, top_k=3)) as attachment:
        assert logits_of(model, tiny_ids).equal(logits_of(other, tiny_ids))
        assert {d.served.experts.shape for d in attachment.decisions} == {(24, 3)}


def test_a_rule_of_two_experts_takes_no_other_number(tiny):
    model = tiny("phimoe")
    with pytest.raises(ExpertlyError, match="its top_k is 2, not 3"):
        attach(model, own(model, top_k=3))


@each_family
def test_capacity_drops_what_it_says(family, tiny, tiny_ids):
    model = tiny(family)
    before = logits_of(model, tiny_ids)
    with attach(model, own(model, eval_capacity_factor=0.5)) as attachment:
        limited = logits_of(model, tiny_ids)
    assert not limited.equal(before)
    room = expert_capacity(24, 2, 8, 0.5)
    for decision in attachment.decisions:
        chosen, served = tokens_per_expert(decision.chosen), tokens_per_expert(decision.served)
        assert served.tolist() == chosen.clamp(max=room).tolist()
        assert not decision.served.weights[~decision.served.kept].any()


@each_family
def test_it_is_watched_and_its_experts_answers_too(family, tiny, tiny_ids):
    model = tiny(family)
    probe = OutputProbe(model)
    probe.arm()
    mask = torch.ones_like(tiny_ids)
    mask[1, -5:] = 0
    with attach(model) as attachment, torch.no_grad():
        model(tiny_ids, attention_mask=mask)
    counts = count_decisions(attachment.decisions, attachment.tokens_by_layer, attachment.rule)
    assert counts.load.sum(-1).tolist() == [2 * 19] * len(moe_layers(model))
    assert 0 < watch_set(counts)["entropy_norm"] < 1
    norms = probe.read()
    assert norms.isnan().equal(counts.load == 0) and (norms[counts.load > 0] > 0).all()


@each_family
def test_it_is_built_from_sizes_in_our_words(family, tiny_sizes):
    """What nobody says follows from them, or is what training from scratch needs."""
    sizes_given = tiny_sizes(family, num_key_value_heads=4)
    config = model_config(family, sizes_given)
    assert sizes(config.to_dict())[:3] == (8, 2, 16)
    if FAMILIES[family].shared_width == "shared_expert_intermediate_size":
        assert sizes(config.to_dict()).shared_width == 16
        two = model_config(family, {**sizes_given, "num_shared_experts": 2})
        assert sizes(two.to_dict()).shared_width == 32
    build_model(config)


@pytest.mark.parametrize("family", BIASED)
def test_the_bias_lands_in_the_familys_own_tensor(family, tiny, tiny_ids, tmp_path):
    model = tiny(family)
    with attach(model, own(model)) as attachment:
        for bias in attachment.bias:
            bias[3] = 100.001  # no bfloat16
        ours = logits_of(model, tiny_ids)
        assert all((d.served.experts == 3).any(-1).all() for d in attachment.decisions)
        folder = save_folder(tmp_path / "model", lambda to: save_model(model, to))
    assert not (folder / POLICY).exists()
    opened = open_model(folder)
    assert logits_of(opened, tiny_ids).equal(ours)
    for layer, bias in zip(moe_layers(opened), attachment.bias, strict=True):
        assert selection_bias(layer.block, FAMILIES[family].bias).equal(bias)


@pytest.mark.parametrize("family", BIASED)
def test_the_bias_moves_in_float32_whatever_the_model_is_in(family, tiny, tiny_ids):
    model = tiny(family).bfloat16()
    with attach(model, own(model)) as attachment:
        before = [bias.clone() for bias in attachment.bias]
        for bias in attachment.bias:
            bias += 1e-4
        assert logits_of(model, tiny_ids).isfinite().all()
        for bias, was in zip(attachment.bias, before, strict=True):
            assert bias.dtype == torch.float32 and bias.shape == (8,)
            assert (bias - was).allclose(torch.tensor(1e-4), rtol=1e-2)


@each_family
def test_it_is_saved_opened_and_inspected(family, tiny, tiny_ids, tmp_path):
    model = tiny(family)
    before = logits_of(model, tiny_ids)
    folder = save_folder(tmp_path / "model", lambda to: save_model(model, to))
    assert logits_of(open_model(folder), tiny_ids).equal(before)
    found = inspect_folder(folder)
    assert (found.experts, found.top_k, found.family) == (8, 2, family)
    assert found.moe_layers == len(moe_layers(model))
    assert found.total == model.num_parameters() + sum(
        b.numel() for n, b in model.named_buffers() if n in model.state_dict()
    )
    layer = moe_layers(model)[0]
    routers = sum(t.numel() for t in layer.router.state_dict().values())
    routed = sum(t.numel() for t in layer.experts.state_dict().values())
    assert found.parameters["router"] >= routers * found.moe_layers
    assert found.parameters["experts"] == routed * found.moe_layers


@pytest.mark.parametrize("family", [name for name in NAMED if name not in FIXED_TOP_K])
def test_another_top_k_is_said_in_stock_keys(family, tiny, tiny_ids, tmp_path):
    model = tiny(family)
    with attach(model, own(model, top_k=3)):
        ours = logits_of(model, tiny_ids)
        save_folder(tmp_path / "model", lambda to: save_model(model, to))
    assert not (tmp_path / "model" / POLICY).exists()
    assert logits_of(open_model(tmp_path / "model"), tiny_ids).equal(ours)


@each_family
def test_another_rule_can_be_followed(family, tiny, tiny_ids):
    model = tiny(family)
    policy = Policy(router="gshard_top2", top_k=2)
    with attach(model, policy) as attachment:
        logits = logits_of(model, tiny_ids)
        assert logits.isfinite().all() and len(attachment.decisions) == len(moe_layers(model))
    said = stock_form(model.config.to_dict(), policy)
    assert (said is not None) == (family in SOFTMAX)


@each_family
def test_a_training_step_moves_every_router(family, tiny, tiny_ids):
    model = tiny(family).train()
    batch = [MicroBatch(tiny_ids[:1], torch.ones_like(tiny_ids[:1]))]
    with attach(model, own(model, capacity_factor=1.25)) as attachment:
        losses = accumulate(model, attachment, batch, RouterConfig())
        routers = [p for layer in attachment.layers for p in layer.router.parameters()]
        learning = [parameter for parameter in routers if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in learning]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert losses.cross_entropy > 0 and losses.aux > 0
    assert all(not a.equal(b) for a, b in zip(before, learning, strict=True))


def parts(model):
    """Parameters by part of the model."""
    counts = Counter()
    for name, tensor in model.named_parameters():
        counts[part_of(name)] += tensor.numel()
    return counts


@each_family
def test_a_twin_is_honest_or_refused(family, tiny):
    row = FAMILIES[family]
    if row.dense is None:
        with pytest.raises(ExpertlyError, match="no dense class"):
            twin_config(tiny(family).config)
        return
    apart = "num_hidden_layers" in NAMED[family] and row.dense_width != row.expert_width
    # dense layers, where it has some, are as wide as what a token uses
    moe = tiny(family, **({row.dense_width: 3 * 16} if apart else {}))
    twin = build_model(twin_config(moe.config))
    ours, theirs = parts(moe), parts(twin)
    for part in ("attention", "norms", "embeddings", "head", "other"):
        assert ours[part] == theirs[part], part
    used = ours["experts"] // 4 + ours["shared experts"] + ours["dense layers"]
    gates = 32 * len(moe_layers(moe)) * (row.shared_width == "shared_expert_intermediate_size")
    assert theirs["dense layers"] == used - gates
    assert theirs["experts"] == theirs["router"] == 0
