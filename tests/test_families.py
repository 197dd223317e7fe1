"""The family table against released checkpoints' configs, and the twins it describes."""

from dataclasses import fields, replace

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from expertly.errors import ExpertlyError
from expertly.families import (
    FAMILIES,
    REFUSED,
    decoder,
    dense_keys,
    family_of,
    moe_layer_indices,
    require_family,
    rule_of,
    sizes,
    stock_keys,
)
from expertly.family_row import Family
from expertly.models.answers import ANSWERS
from expertly.models.layers import LOGITS
from expertly.moe.policy import rule_defaults
from expertly.moe.routing import ROUTERS

# released checkpoints, as their config.json says it
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
}
OLMOE = {
    "model_type": "olmoe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "norm_topk_prob": False,
    "num_hidden_layers": 16,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 61,
}
QWEN2 = {
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "num_hidden_layers": 24,
}
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "num_hidden_layers": 60,
}
GPT_OSS = {**MIXTRAL, "model_type": "gpt_oss", "num_local_experts": 32, "intermediate_size": 2880}
ERNIE = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
    "num_hidden_layers": 28,
}
PHIMOE = {
    "model_type": "phimoe",
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "intermediate_size": 6400,
    "router_jitter_noise": 0.01,
    "num_hidden_layers": 32,
}
JAMBA = {
    "model_type": "jamba",
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "intermediate_size": 14336,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_hidden_layers": 32,
}
HUNYUAN = {
    "model_type": "hunyuan_v1_moe",
    "num_experts": 64,
    "moe_topk": [8] * 32,
    "intermediate_size": 3072,
    "num_hidden_layers": 32,
}
LLAMA4 = {
    "model_type": "llama4_text",
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 2,
    "num_hidden_layers": 48,
}
SWITCH = {"model_type": "switch_transformers", "num_experts": 8, "d_ff": 2048, "num_layers": 12}
RELEASED = (
    MIXTRAL,
    QWEN3_30B,
    OLMOE,
    DEEPSEEK_V3,
    QWEN2,
    DEEPSEEK_V2,
    GPT_OSS,
    ERNIE,
    PHIMOE,
    JAMBA,
    HUNYUAN,
    LLAMA4,
    SWITCH,
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MIXTRAL, (8, 2, 14336, 0)),
        (QWEN3_30B, (128, 8, 768, 0)),
        (OLMOE, (64, 8, 1024, 0)),
        (DEEPSEEK_V3, (256, 8, 2048, 2048)),
        (QWEN2, (60, 4, 1408, 5632)),
        (DEEPSEEK_V2, (160, 6, 1536, 2 * 1536)),
        ({**DEEPSEEK_V2, "n_shared_experts": None}, (160, 6, 1536, 0)),
        (ERNIE, (64, 6, 1536, 2 * 1536)),
        (JAMBA, (16, 2, 14336, 0)),
        (HUNYUAN, (64, 8, 3072, 3072)),
        (LLAMA4, (128, 1, 8192, 8192)),
        (SWITCH, (8, 1, 2048, 0)),
    ],
)
def test_sizes_of_released_checkpoints(config, expected):
    assert tuple(sizes(config)) == expected


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (MIXTRAL, range(32)),
        (DEEPSEEK_V3, range(3, 61)),
        (QWEN3_30B, range(48)),
        ({**QWEN3_30B, "decoder_sparse_step": 1, "mlp_only_layers": []}, range(48)),
        ({**QWEN3_30B, "mlp_only_layers": None}, range(48)),
        ({**QWEN3_30B, "decoder_sparse_step": 2}, range(1, 48, 2)),
        ({**QWEN3_30B, "mlp_only_layers": [0, 47]}, range(1, 47)),
        ({**QWEN3_30B, "decoder_sparse_step": 3, "mlp_only_layers": [2, 3]}, range(5, 48, 3)),
        ({**DEEPSEEK_V3, "first_k_dense_replace": 61}, ()),
        ({**MIXTRAL, "decoder_sparse_step": 2}, range(32)),  # not a key of this family
        (ERNIE, range(1, 28)),
        ({**ERNIE, "moe_layer_end_index": -1, "moe_layer_interval": 2}, range(1, 28, 2)),
        ({**ERNIE, "moe_layer_end_index": 9}, range(1, 10)),
        (JAMBA, range(1, 32, 2)),
        ({**JAMBA, "expert_layer_offset": 0}, range(0, 32, 2)),
        (LLAMA4, range(1, 48, 2)),
        ({**LLAMA4, "moe_layers": [3, 5]}, (3, 5)),
    ],
)
def test_which_layers_are_moe_layers(config, layers):
    assert moe_layer_indices(config) == list(layers)


def test_a_word_per_layer_decides_where_the_config_has_one(monkeypatch):
    layers = {"types": "mlp_layer_types", "first": "first_k_dense_replace"}
    monkeypatch.setitem(FAMILIES, "mixtral", replace(FAMILIES["mixtral"], layers=layers))
    config = {**MIXTRAL, "num_hidden_layers": 3, "first_k_dense_replace": 2}
    assert moe_layer_indices(config) == [2]
    assert moe_layer_indices({**config, "mlp_layer_types": ["sparse", "dense", "moe"]}) == [0, 2]


def test_a_composites_decoder_has_the_keys(monkeypatch):
    row = replace(FAMILIES["mixtral"], name="seeing", nested="whole.text")
    monkeypatch.setitem(FAMILIES, "seeing", row)
    config = {"model_type": "seeing", "whole": {"text": MIXTRAL, "eyes": 2}}
    assert sizes(config) == sizes(MIXTRAL)
    assert moe_layer_indices(config) == list(range(32))
    assert decoder(MIXTRAL) is MIXTRAL and decoder(config) is MIXTRAL
    (keys,) = stock_keys(config, 3, {"renormalize": True})
    assert keys == {"whole": {"text": {**MIXTRAL, "num_experts_per_tok": 3}, "eyes": 2}}
    with pytest.raises(ExpertlyError, match="none of intermediate_size"):
        sizes({"model_type": "seeing", "whole": None})


def test_a_second_spelling_is_read_and_a_missing_one_refused():
    other = {**QWEN3_30B, "num_local_experts": 16}
    del other["num_experts"]
    assert sizes(other).num_experts == 16
    del other["num_local_experts"]
    with pytest.raises(ExpertlyError, match="none of num_experts, num_local_experts") as refusal:
        sizes(other)
    assert refusal.value.code == "E305"


def test_layers_of_different_numbers_are_refused():
    with pytest.raises(ExpertlyError, match="none of moe_topk is there"):
        sizes({**HUNYUAN, "moe_topk": [8] * 31 + [4]})


GROUPS = {"num_groups": 8, "topk_groups": 4, "scale": 2.5}
V2_GROUPS = {"num_groups": 8, "topk_groups": 3, "scale": 16.0}
V2_RULE = {"renormalize": False, "ordered": False}


@pytest.mark.parametrize(
    ("config", "rule", "expected"),
    [
        (MIXTRAL, "softmax_topk", {"renormalize": True}),
        (QWEN3_30B, "softmax_topk", {"renormalize": True}),
        (OLMOE, "softmax_topk", {"renormalize": False}),
        (DEEPSEEK_V3, "biased_sigmoid_topk", {"renormalize": True, **GROUPS}),
        (DEEPSEEK_V2, "softmax_topk", {**V2_RULE, **V2_GROUPS}),
        (
            {**DEEPSEEK_V2, "topk_method": "greedy"},  # its groups are only read by the other word
            "softmax_topk",
            {**V2_RULE, "num_groups": 1, "topk_groups": 1, "scale": 16.0},
        ),
        (GPT_OSS, "topk_softmax", {}),
        (ERNIE, "biased_softmax_topk", {"minimum": 1e-12}),
        (PHIMOE, "sparsemixer", {"tolerance": 0.01}),
        (LLAMA4, "topk_sigmoid", {}),
        (SWITCH, "switch_top1", {}),
    ],
)
def test_the_rule_and_its_options_come_from_the_config(config, rule, expected):
    assert rule_of(config) == (rule, expected)


@pytest.mark.parametrize("word", ["noaux_tc", 3, ["greedy"]])
def test_a_word_that_the_family_does_not_know_is_refused(word):
    with pytest.raises(ExpertlyError, match=r"topk_method is .* expected one of greedy") as refusal:
        rule_of({**DEEPSEEK_V2, "topk_method": word})
    assert refusal.value.code == "E305"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_every_row_fits_our_rules_and_transformers_classes(name):
    row, config = FAMILIES[name], AutoConfig.for_model(name).to_dict()
    assert row.name == name and (row.may_be_dense or family_of(config) is row)
    said = {**decoder(config), **AutoConfig.for_model(name).attribute_map}
    assert set(row.scratch) <= set(said)
    named = (row.shared_experts, row.shared_width, row.expert_width, *row.options.values())
    assert {*filter(None, named), *row.words} <= set(said)
    assert any(key in said for key in row.layers.values()) or not row.layers
    assert row.rule in ROUTERS and row.logits in LOGITS and row.answer in ANSWERS
    takes = set(rule_defaults(ROUTERS[row.rule]))
    assert set(row.options) | set(row.fixed) <= takes
    assert (row.bias is not None) == ROUTERS[row.rule].biased
    if row.dense is not None:
        AutoConfig.for_model(row.dense)  # the twin's class is there


def test_no_row_sets_what_no_row_needs():
    """A field of the table that every row leaves at its default would be a dead one."""
    for field in fields(Family):
        if field.name not in ("name", "nested"):
            assert len({repr(getattr(row, field.name)) for row in FAMILIES.values()}) > 1, field


@pytest.mark.parametrize("config", RELEASED, ids=lambda config: config["model_type"])
def test_stock_keys_say_the_familys_own_rule_back(config):
    row, (rule, options) = FAMILIES[config["model_type"]], rule_of(config)
    said = [{**config, **keys} for keys in stock_keys(config, sizes(config).top_k, options)]
    assert (rule, options) in [rule_of(made) for made in said]
    if isinstance(row.top_k, str):
        for keys in stock_keys(config, 3, options):
            assert sizes({**config, **keys}).top_k == 3


def test_stock_keys_change_what_the_config_can_say():
    (keys,) = stock_keys(OLMOE, 4, {"renormalize": True})
    assert keys == {"num_experts_per_tok": 4, "norm_topk_prob": True}
    assert rule_of({**OLMOE, **keys}) == ("softmax_topk", {"renormalize": True})


def test_stock_keys_try_every_word():
    words = [keys["topk_method"] for keys in stock_keys(DEEPSEEK_V2, 6, V2_GROUPS)]
    assert words == ["greedy", "group_limited_greedy"]


@pytest.mark.parametrize(
    ("config", "model_type", "width", "changed"),
    [
        (MIXTRAL, "mistral", 2 * 14336, set()),
        (QWEN3_30B, "qwen3", 8 * 768, set()),
        (OLMOE, "olmo2", 8 * 1024, set()),
        # its own dense class: every layer is one of its dense first ones
        (DEEPSEEK_V3, "deepseek_v3", 9 * 2048, {"first_k_dense_replace"}),
        (QWEN2, "qwen2", 4 * 1408 + 5632, set()),
        (ERNIE, "ernie4_5", 8 * 1536, set()),
        (HUNYUAN, "hunyuan_v1_dense", 9 * 3072, set()),
    ],
)
def test_the_twin_is_as_wide_as_what_one_token_uses(config, model_type, width, changed):
    twin = dense_keys(config)
    assert (twin["model_type"], twin["intermediate_size"]) == (model_type, width)
    same = {key for key, value in config.items() if twin[key] == value}
    assert set(config) - same - {"model_type", "intermediate_size"} == changed
    if model_type == config["model_type"]:
        assert moe_layer_indices(twin) == []


def test_a_twin_of_its_own_class_has_no_moe_layer():
    twin = dense_keys(LLAMA4)
    assert moe_layer_indices(twin) == [] and twin["intermediate_size_mlp"] == 2 * 8192
    twin = dense_keys({**QWEN2, "model_type": "qwen3_next"})
    assert moe_layer_indices(twin) == [] and twin["mlp_only_layers"] == list(range(24))


@pytest.mark.parametrize("config", [GPT_OSS, PHIMOE, JAMBA])
def test_a_family_without_a_dense_class_has_no_twin(config):
    with pytest.raises(ExpertlyError, match=r"no dense class of .* make") as refusal:
        dense_keys(config)
    assert refusal.value.code == "E202"


def test_a_refused_family_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(REFUSED, "hashed", "its tokens choose experts by their id")
    with pytest.raises(ExpertlyError, match="'hashed': its tokens choose") as refusal:
        require_family({"model_type": "hashed"})
    assert refusal.value.code == "E306"
    assert not set(REFUSED) & set(FAMILIES)


def test_an_unknown_family_is_refused_with_the_nearest_name():
    assert family_of({"model_type": "llama"}) is None and family_of({}) is None
    for call in (require_family, sizes, moe_layer_indices, rule_of, dense_keys):
        with pytest.raises(ExpertlyError) as refusal:
            call({"model_type": "qwen4_moe"})
        assert (refusal.value.code, refusal.value.exit_code) == ("E306", 3)
        assert "write qwen3_moe" in str(refusal.value)
