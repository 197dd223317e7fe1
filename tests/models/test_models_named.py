"""What test_models_decorated.py leaves open, for the named families."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_families import tiny_family

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES, sizes
from expertly.folders import save_folder
from expertly.models.attach import attach
from expertly.models.build import build_model, model_config, twin_config
from expertly.models.inspect import part_of
from expertly.models.layers import moe_layers, own_policy
from expertly.models.loading import open_model, save_model
from expertly.models.policies import POLICY, require_sayable, stock_form
from expertly.models.probe import OutputProbe
from expertly.moe.policy import Policy
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
SWITCHABLE = [name for name in NAMED if name != "llama4_text"]  # its experts take no list
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


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def own(model, **changes):
    return replace(own_policy(model.config.to_dict()), **changes)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("family", SWITCHABLE)
def test_the_familys_own_rule_changes_no_bit_whatever_runs_the_experts(
    family, experts, tiny, tiny_ids
):
    model = tiny(family)
    model.set_experts_implementation(experts)
    before = logits_of(model, tiny_ids)
    with attach(model, own(model)):
        assert logits_of(model, tiny_ids).equal(before)


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


@pytest.mark.parametrize("family", [name for name in NAMED if name not in FIXED_TOP_K])
def test_another_top_k_is_said_in_stock_keys(family, tiny, tiny_ids, tmp_path):
    model = tiny(family)
    with attach(model, own(model, top_k=3)):
        ours = logits_of(model, tiny_ids)
        folder = save_folder(tmp_path / "model", lambda to: save_model(model, to))
    assert not (folder / POLICY).exists()
    assert logits_of(open_model(folder), tiny_ids).equal(ours)


def test_a_top_k_that_layers_without_a_rule_would_follow_too_is_not_stock(tiny_ids):
    model = tiny_family("deepseek_v4")  # its first layer's experts are chosen by token ids
    config, policy = model.config.to_dict(), own(model, top_k=3)
    with attach(model, policy) as attachment:
        assert logits_of(model, tiny_ids, use_cache=False).isfinite().all()
        assert {d.served.experts.shape for d in attachment.decisions} == {(24, 3)}
    assert stock_form(config, policy) is None
    with pytest.raises(ExpertlyError, match=r"E204\].*stock loaders would compute"):
        require_sayable(config, policy, allow_non_stock=False)
    assert stock_form(config, own(model)) is not None
    with attach(model, Policy(router="softmax_topk", top_k=2)):
        assert logits_of(model, tiny_ids, use_cache=False).isfinite().all()


def test_a_rule_that_only_transformers_knows_is_not_watched_and_said_so():
    model = tiny_family("lfm2_moe", use_expert_bias=False)
    with pytest.raises(
        ExpertlyError, match=r"E306\].*its routing rule is not read: use_expert_bias"
    ):
        attach(model)


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


@pytest.mark.parametrize("family", [name for name in NAMED if FAMILIES[name].dense])
def test_every_part_of_a_twin_is_as_large(family, tiny):
    row = FAMILIES[family]
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
