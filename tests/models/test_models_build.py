"""Building from sizes: translation, refusals, and a twin that computes as much per token."""

import pytest
import torch
from tiny_families import tiny_config
from transformers import AutoConfig

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES as TABLE
from expertly.families import moe_layer_indices, sizes
from expertly.models.build import (
    build_model,
    model_config,
    moe_config,
    own_keys,
    parameters,
    twin_config,
    write_config,
)
from expertly.models.layers import moe_layers

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
CLASSES = {
    "mixtral": ("MixtralForCausalLM", "MistralForCausalLM"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM"),
    "olmoe": ("OlmoeForCausalLM", "Olmo2ForCausalLM"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLM"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_our_words_become_the_familys(family, tiny_sizes):
    given = tiny_sizes(family, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
    config = model_config(family, given)
    moe = sizes(config.to_dict())
    assert (moe.num_experts, moe.top_k, moe.expert_width) == (6, 3, 24)
    assert moe.shared_width == (24 if family == "deepseek_v3" else 0)
    model = build_model(config)
    assert type(model).__name__ == CLASSES[family][0]
    for layer in moe_layers(model):
        assert layer.experts.down_proj.shape == (6, 32, 24)
        assert layer.router.weight.shape == (6, 32)
    assert given == tiny_sizes(
        family, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24
    ), "the caller's sizes were changed"


def test_what_training_from_scratch_needs_is_filled_in(tiny_sizes):
    given = tiny_sizes("deepseek_v3")
    del given["num_key_value_heads"], given["eos_token_id"], given["bos_token_id"]
    config = model_config("deepseek_v3", given)
    assert (config.n_group, config.topk_group, config.first_k_dense_replace) == (1, 1, 1)
    assert config.num_key_value_heads == 4, "latent attention has a key per head"
    assert config.eos_token_id is None, "the id of another tokenizer"
    assert build_model(config)(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    assert model_config("qwen3_moe", tiny_sizes("qwen3_moe")).norm_topk_prob


def test_dense_layers_of_an_moe_are_as_wide_as_what_a_token_uses(tiny_sizes):
    given = tiny_sizes("deepseek_v3")
    del given["intermediate_size"]
    assert model_config("deepseek_v3", given).intermediate_size == 2 * 16 + 16


@pytest.mark.parametrize(
    ("family", "given", "leaf", "said"),
    [
        ("mixtral", {"hiden_size": 32}, "hiden_size", "write hidden_size"),
        ("mixtral", {"num_shared_experts": 1}, "num_shared_experts", "no such size"),
        ("llama", {"num_experts": 8}, "num_experts", "no such size"),
        ("llama", {"moe_intermediate_size": 8}, "moe_intermediate_size", "intermediate_size"),
        ("mixtral", {"intermediate_size": 64}, "moe_intermediate_size", "leave out"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok", "there are 8 experts"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok", "there are 8 experts"),
        ("olmoe", {"num_experts": 0}, "num_experts_per_tok", "there are 0 experts"),
        ("olmoe", {"hidden_size": "big"}, "olmoe", "expected int"),
        ("mixtral", {"hidden_size": 30}, "num_attention_heads", "do not fill 30"),
        ("mixtral", {"hidden_size": -4}, "hidden_size", "at least 1"),
        ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size", "at least 1"),
        ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads", "do not divide"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads", "one per head"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step", "at least 1"),
        ("mixtral", {"hidden_act": "nope"}, "hidden_act", "no activation"),
    ],
)
def test_an_impossible_size_is_refused_by_name(family, given, leaf, said, tiny_sizes):
    base = tiny_sizes(family) if family != "llama" else {"hidden_size": 32}
    with pytest.raises(ExpertlyError, match=said) as error:
        model_config(family, {**base, **given})
    assert (error.value.code, error.value.what) == ("E202", f"model.{leaf}")


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ExpertlyError, match="write mixtral") as error:
        model_config("mixtrall", {})
    assert error.value.code == "E306"


PLAIN = [name for name, row in TABLE.items() if not row.nested]


@pytest.mark.parametrize("family", PLAIN)
def test_every_family_is_built_from_sizes_in_our_words_or_says_what_it_needs(family, tiny_sizes):
    try:
        config = model_config(family, tiny_sizes(family, num_key_value_heads=4))
        with torch.device("meta"):
            build_model(config)
    except ExpertlyError as refusal:
        assert refusal.code == ("E306" if family == "switch_transformers" else "E202")
        assert family in refusal.what or family in refusal.why


def test_what_a_class_needs_besides_sizes_is_named(tiny_sizes):
    with pytest.raises(ExpertlyError, match=r"E202\].* set what it needs .* of layer_types$"):
        build_model(model_config("lfm2_moe", tiny_sizes("lfm2_moe")))


# --- Twins -------------------------------------------------------------------------------------


def active(model) -> int:
    """Parameters that one token uses, counted by modules."""
    total = sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            block = model.get_submodule(name.removesuffix(".experts"))
            share = block.gate.top_k / module.num_experts
            total -= round((1 - share) * sum(p.numel() for p in module.parameters()))
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_is_the_dense_class_with_the_same_active_parameters(family, tiny_sizes):
    realistic = {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4}
    experts = {"num_experts": 16, "moe_intermediate_size": 256, "intermediate_size": None}
    given = {**tiny_sizes(family), **realistic, **experts}
    config = model_config(family, {k: v for k, v in given.items() if v is not None})
    with torch.device("meta"):
        moe, twin = build_model(config), build_model(twin_config(config))
    assert type(twin).__name__ == CLASSES[family][1]
    assert not any("experts.down_proj" in name for name, _ in twin.named_parameters())
    assert active(twin) == sum(p.numel() for p in twin.parameters())
    assert active(moe) == pytest.approx(active(twin), rel=0.01)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(twin.config, key) == getattr(config, key)
    assert twin.config.initializer_range == config.initializer_range


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_runs_and_reloads(family, tiny_sizes, tmp_path):
    config = twin_config(model_config(family, tiny_sizes(family)))
    model = build_model(config)
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == config.model_type


UNEVEN = [
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 3, "mlp_only_layers": [2]}),
    ("deepseek_v3", {"first_k_dense_replace": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 2, "num_shared_experts": 2}),
]


@pytest.mark.parametrize(("family", "given"), UNEVEN)
def test_transformers_agrees_which_layers_are_moe_layers(family, given, tiny_sizes):
    config = model_config(family, {**tiny_sizes(family), "num_hidden_layers": 4, **given})
    with torch.device("meta"):
        blocks = [layer.name for layer in moe_layers(build_model(config))]
    assert [int(name.split(".")[2]) for name in blocks] == moe_layer_indices(config.to_dict())


@pytest.mark.parametrize(("family", "given"), UNEVEN)
def test_dense_layers_of_another_width_have_no_twin(family, given, tiny_sizes):
    sizes_given = {**tiny_sizes(family), "num_hidden_layers": 4, **given}
    wide = model_config(family, {**sizes_given, "intermediate_size": 500})
    with pytest.raises(ExpertlyError) as error:
        twin_config(wide)
    assert (error.value.code, error.value.what) == ("E202", "model.intermediate_size")
    fixed = int(error.value.fix.removeprefix("set intermediate_size="))
    config = model_config(family, {**sizes_given, "intermediate_size": fixed})
    with torch.device("meta"):
        moe, twin = build_model(config), build_model(twin_config(config))
    routers = sum(layer.router.weight.numel() for layer in moe_layers(moe))
    assert active(moe) - routers == active(twin)


@pytest.mark.parametrize("family", [name for name, row in TABLE.items() if row.dense is None])
def test_a_family_without_a_dense_class_has_no_twin(family):
    with pytest.raises(ExpertlyError, match="transformers has no dense class") as error:
        twin_config(tiny_config(family))
    assert (error.value.code, error.value.what) == ("E202", "model.twin")


def test_a_twin_is_its_own_twin_where_the_class_is_the_same(tiny_sizes):
    twin = twin_config(model_config("deepseek_v3", tiny_sizes("deepseek_v3")))
    assert twin_config(twin).to_dict() == twin.to_dict()


# --- MoEs of dense models ----------------------------------------------------------------------

DENSE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 77,
    "rms_norm_eps": 0.01,
    "hidden_act": "gelu",
    "initializer_range": 0.3,
    "eos_token_id": 7,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 555.0, "factor": 2.0},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "flex_olmo"])
def test_an_moe_takes_over_what_its_class_knows_of_a_dense_config(family):
    dense = model_config("llama", DENSE)
    config = moe_config(dense, family, EXPERTS)
    for key in DENSE.keys() - {"intermediate_size"}:
        assert getattr(config, key) == getattr(dense, key), key
    moe = sizes(config.to_dict())
    assert (moe.num_experts, moe.top_k, moe.expert_width) == (6, 3, 24)
    with torch.device("meta"):
        model = build_model(config)
    assert model.config.model_type == family
    assert dense.to_dict() == model_config("llama", DENSE).to_dict(), "the dense config stays"


def test_what_a_dense_class_does_not_read_is_not_taken_over():
    dense = model_config("llama", DENSE)
    dense.sliding_window, dense.router_jitter_noise, dense.architectures = 9, 0.5, ["Llama"]
    config = moe_config(dense, "mixtral", EXPERTS)
    assert (config.sliding_window, config.router_jitter_noise) == (None, 0.0)
    assert config.architectures is None
    assert not {"sliding_window", "router_jitter_noise"} & own_keys(dense).keys()
    assert own_keys(dense)["head_dim"] == 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**EXPERTS, "num_experts_per_tok": 7}, "num_experts_per_tok: 7, but there are 6 experts"),
        ({**EXPERTS, "moe_intermediate_size": 0}, "intermediate_size: 0, but it must be at least"),
        ({**EXPERTS, "hidden_size": "wide"}, "target mixtral: .*hidden_size"),
    ],
)
def test_an_moe_of_impossible_sizes_is_refused(given, said):
    with pytest.raises(ExpertlyError, match=said) as caught:
        moe_config(model_config("llama", DENSE), "mixtral", given)
    assert caught.value.code == "E202"


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_a_model(family, tiny_sizes, tiny_model):
    config = model_config(family, tiny_sizes(family))
    assert parameters(config) == sum(each.numel() for each in tiny_model(family).parameters())


def test_parameters_of_what_fits_in_no_memory():
    config = model_config("mixtral", {"hidden_size": 2**16, "num_hidden_layers": 40})
    assert parameters(config) > 10**12


def test_a_written_config_names_the_class(tiny_sizes, tmp_path):
    write_config(model_config("mixtral", tiny_sizes("mixtral")), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.architectures) == ("mixtral", ["MixtralForCausalLM"])
