"""Every formula against the model that transformers makes of the same config, part by part."""

from collections import Counter

import pytest

from expertly.errors import ExpertlyError
from expertly.families import family_of, sizes
from expertly.models.count import count_parameters
from expertly.plan.counted import shape_of_counts
from expertly.plan.known import known, shape_of
from expertly.plan.makes import MAKES
from expertly.plan.reading import has_formulas, read_shape
from expertly.plan.shape import PARTS, Count, parameters, total

# what transformers has no class for
BUILDABLE = [
    name for name, config in known().items() if config["model_type"] not in ("deepseek", "gemma3")
]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
GLM = {key: value for key, value in LATENT.items() if "head_dim" not in key and "lora" not in key}
ERNIE = {
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 10,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 2,
}
SWITCH = {
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 40,
    "vocab_size": 300,
    "num_heads": 4,
    "num_layers": 6,
    "num_decoder_layers": 4,
    "num_experts": 8,
}
# what a config can switch: each is built with everything as it stands, then one by one
SWITCHES = {
    "llama": [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}],
    "mistral": [{"head_dim": 16}, {"tie_word_embeddings": True}],
    "qwen2": [{"tie_word_embeddings": True}],
    "qwen3": [{"attention_bias": True}, {"head_dim": 16}],
    "gemma2": [{"attention_bias": True}, {"tie_word_embeddings": False}],
    "gemma3_text": [{"attention_bias": True}, {"head_dim": 16}],
    "olmo2": [{"attention_bias": True}],
    "granite": [{"attention_bias": True}, {"mlp_bias": True}],
    "mixtral": [MOE, {**MOE, "head_dim": 16}],
    "qwen2_moe": [
        {**QWEN, "shared_expert_intermediate_size": 14},
        {**QWEN, "shared_expert_intermediate_size": 14, "qkv_bias": False},
        {**QWEN, "shared_expert_intermediate_size": 14, "decoder_sparse_step": 2},
    ],
    "qwen3_moe": [QWEN, {**QWEN, "attention_bias": True, "mlp_only_layers": [0, 3]}],
    "olmoe": [
        {"num_experts": 8, "num_experts_per_tok": 2},
        {"num_experts": 8, "num_experts_per_tok": 2, "attention_bias": True},
    ],
    "deepseek_v2": [
        {**LATENT, "n_shared_experts": 2},
        {**LATENT, "attention_bias": True, "mlp_bias": True},
        {**LATENT, "q_lora_rank": None},
    ],
    "deepseek_v3": [LATENT, {**LATENT, "attention_bias": True}, {**LATENT, "q_lora_rank": None}],
    "gpt_oss": [MOE, {**MOE, "attention_bias": False}],
    "granitemoe": [MOE, {**MOE, "attention_bias": True, "tie_word_embeddings": True}],
    "glm4_moe": [GLM, {**GLM, "use_qk_norm": True, "attention_bias": True, "head_dim": 16}],
    "ernie4_5_moe": [ERNIE, {**ERNIE, "use_bias": True}, {**ERNIE, "tie_word_embeddings": False}],
    "phimoe": [MOE, {**MOE, "attention_bias": True, "lm_head_bias": True}],
    "switch_transformers": [
        SWITCH,
        {**SWITCH, "router_bias": True, "num_sparse_encoder_layers": 6},
        {**SWITCH, "num_sparse_decoder_layers": 0, "tie_word_embeddings": False},
    ],
}
CASES = [
    pytest.param(
        {"model_type": family, **({} if "d_model" in switched else SMALL), **switched},
        id=f"{family}-{number}",
    )
    for family, variants in SWITCHES.items()
    for number, switched in enumerate([*variants, {**variants[0], "tie_word_embeddings": True}])
]


def built(config):
    """What the class of a config holds, by part: in all, and active."""
    counted = count_parameters(config)
    parts = Counter(counted.rest)
    for layer in counted.layers:
        parts.update(layer)
    idle = 0
    if config["model_type"] == "switch_transformers":
        idle = (config["num_experts"] - 1) / config["num_experts"]
    elif family_of(config):
        moe = sizes(config)
        idle = 1 - moe.top_k / moe.num_experts
    return {
        part: Count(count, round(count - idle * count * (part == "experts")))
        for part, count in parts.items()
        if count
    }


@pytest.mark.parametrize("name", BUILDABLE)
def test_a_built_in_model_has_the_parameters_of_its_class(name):
    assert parameters(shape_of(name)) == built(known()[name])


@pytest.mark.parametrize("config", CASES)
def test_every_switch_of_a_family_is_counted(config):
    assert parameters(read_shape(config, "small")) == built(config)


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-12b", "gemma-3-27b"])
def test_a_composite_holds_its_tower_and_text_passes_its_decoder(name):
    config = known()[name]
    counted, text = count_parameters(config), read_shape(config["text_config"], "decoder alone")
    shape = shape_of(name)
    layers = sum(sum(layer.values()) for layer in counted.layers)
    assert total(shape).total == layers + sum(counted.rest.values())
    assert total(shape).active == total(text).total == total(shape).total - shape.beside
    assert "vision tower" in shape.notes[0]


def test_every_family_with_formulas_is_switched():
    assert set(SWITCHES) == {*MAKES, "switch_transformers"} - {"deepseek"}


FOREIGN = {
    "qwen3_next": {
        **QWEN,
        "shared_expert_intermediate_size": 14,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2_moe": {
        **QWEN,
        "num_dense_layers": 2,
        "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
    },
    "smollm3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("family", FOREIGN)
def test_a_family_without_formulas_is_counted_on_the_meta_device(family):
    config = {"model_type": family, **SMALL, **FOREIGN[family]}
    assert not has_formulas(config)
    counted = count_parameters(config)
    shape = shape_of_counts(config, "foreign", counted.layers, counted.rest)
    assert total(shape).total == sum(count.total for count in built(config).values())
    assert parameters(shape).get("experts") == built(config).get("experts")
    assert len(shape.layers) == 6 and "counted on the meta device" in shape.notes[0]


def test_layers_without_attention_keep_no_cache():
    config = {"model_type": "qwen3_next", **SMALL, **FOREIGN["qwen3_next"]}
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config["layer_types"] = kinds + kinds[:2]
    counted = count_parameters(config)
    shape = shape_of_counts(config, "foreign", counted.layers, counted.rest)
    assert [layer.attention.cache for layer in shape.layers] == [0, 0, 0, 2 * 2 * 16, 0, 0]


def windows(config):
    return [layer.attention.window for layer in read_shape(config, "windowed").layers]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"model_type": "mistral"}, [4096] * 6, id="mistral by default"),
        pytest.param({"model_type": "mistral", "sliding_window": None}, [None] * 6, id="said none"),
        pytest.param({"model_type": "llama", "sliding_window": 8}, [None] * 6, id="llama has none"),
        pytest.param(
            {"model_type": "gemma2", "sliding_window": 8}, [8, None] * 3, id="every second"
        ),
        pytest.param(
            {"model_type": "gemma3_text", "sliding_window": 8}, [8] * 5 + [None], id="gemma 3"
        ),
        pytest.param({"model_type": "qwen2", "sliding_window": 8}, [None] * 6, id="switched off"),
        pytest.param(
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            [None] * 4 + [8, 8],
            id="beyond the first four",
        ),
        pytest.param(
            {
                "model_type": "gemma2",
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 5 + ["sliding_attention"],
            },
            [None] * 5 + [8],
            id="a word for each layer",
        ),
    ],
)
def test_windows_are_those_of_the_class(config, expected):
    assert windows({**SMALL, **config}) == expected


def test_latent_attention_keeps_its_latent():
    attention = shape_of("deepseek-v3").layers[0].attention
    assert attention.cache == 512 + 64
    assert attention.pair == 128 * (128 + 64 + 128)
    assert attention.absorbed == 128 * (2 * 512 + 64)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param({"hidden_size": None}, "hidden_size is None", id="null"),
        pytest.param({"vocab_size": "many"}, "vocab_size is 'many'", id="a word"),
        pytest.param({"intermediate_size": -1}, "intermediate_size is -1", id="negative"),
        pytest.param({"num_hidden_layers": 2**63}, "num_hidden_layers is 9223", id="absurd"),
        pytest.param({"num_attention_heads": True}, "num_attention_heads is True", id="a flag"),
        pytest.param({"num_attention_heads": 64}, "more than hidden_size", id="too many heads"),
    ],
)
def test_an_impossible_size_is_named(changed, named):
    with pytest.raises(ExpertlyError, match="E305") as caught:
        read_shape({"model_type": "llama", **SMALL, **changed}, "bad")
    assert named in str(caught.value) and caught.value.exit_code == 3


def test_a_missing_size_is_named():
    config = {"model_type": "llama", **SMALL}
    del config["intermediate_size"]
    with pytest.raises(ExpertlyError, match=r"E305.*intermediate_size is missing"):
        read_shape(config, "bad")


def test_more_experts_per_token_than_experts_are_refused():
    config = {"model_type": "mixtral", **SMALL, **MOE, "num_experts_per_tok": 9}
    with pytest.raises(ExpertlyError, match=r"E305.*a token uses 9 experts, but there are 8"):
        read_shape(config, "bad")


def test_parts_are_in_the_order_of_a_token_s_way():
    found = list(parameters(shape_of("deepseek-v3")))
    assert found == [part for part in PARTS if part != "other"]
