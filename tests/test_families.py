"""The family table against released checkpoints' configs, and the twins it describes."""

import json
from dataclasses import fields, replace

import pytest
from released_configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS1,
    ERNIE,
    FLEX_OLMO,
    GEMMA4,
    GLM45_AIR,
    GPT_OSS_20B,
    GPT_OSS_120B,
    GRANITE,
    HUNYUAN,
    JAMBA,
    LLAMA4,
    MINIMAX_M2,
    MIXTRAL,
    NEMOTRON_3,
    OLMOE,
    PHIMOE,
    QWEN2,
    QWEN3_30B,
    QWEN3_NEXT,
    QWEN3_VL,
    RELEASED,
    SWITCH,
)
from transformers import CONFIG_MAPPING, AutoConfig

from expertly.errors import ExpertlyError
from expertly.families import (
    FAMILIES,
    REFUSED,
    decoder,
    dense_keys,
    family_of,
    moe_layer_indices,
    num_layers,
    require_family,
    rule_of,
    sizes,
    stock_keys,
)
from expertly.family_row import Family
from expertly.models.answers import ANSWERS
from expertly.models.configs import read_config
from expertly.models.layers import LOGITS
from expertly.moe.policy import rule_defaults
from expertly.moe.routing import ROUTERS

each_released = pytest.mark.parametrize("config", RELEASED, ids=lambda config: config["model_type"])


@each_released
def test_released_configs_are_taken(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MIXTRAL, (8, 2, 14336, 0)),
        (QWEN3_30B, (128, 8, 768, 0)),
        (OLMOE, (64, 8, 1024, 0)),
        (DEEPSEEK_V3, (256, 8, 2048, 2048)),
        (QWEN2, (60, 4, 1408, 5632)),
        (DEEPSEEK_V2, (160, 6, 1536, 2 * 1536)),
        ({**DEEPSEEK_V2, "n_shared_experts": 0}, (160, 6, 1536, 0)),
        (GPT_OSS_20B, (32, 4, 2880, 0)),
        (GPT_OSS_120B, (128, 4, 2880, 0)),
        (GRANITE, (32, 8, 512, 0)),
        (GLM45_AIR, (128, 8, 1408, 1408)),
        (DOTS1, (128, 6, 1408, 2 * 1408)),
        (FLEX_OLMO, (7, 7, 11008, 0)),
        (MINIMAX_M2, (256, 8, 1536, 0)),
        (QWEN3_NEXT, (512, 10, 512, 512)),
        (QWEN3_VL, (128, 8, 768, 0)),
        (NEMOTRON_3, (128, 6, 1856, 3712)),
        (ERNIE, (64, 6, 1536, 2 * 1536)),
        (JAMBA, (16, 2, 14336, 0)),
        (HUNYUAN, (64, 8, 3072, 3072)),
        (LLAMA4, (128, 1, 8192, 8192)),
        (SWITCH, (8, 1, 2048, 0)),
        (GEMMA4, (128, 8, 704, 2112)),
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
        (NEMOTRON_3, [at for at in range(52) if NEMOTRON_3["hybrid_override_pattern"][at] == "E"]),
        (QWEN3_VL, range(48)),
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


def test_a_composites_decoder_has_the_keys():
    config = {"model_type": "llama4", "text_config": LLAMA4, "vision_config": {"depth": 2}}
    assert sizes(config) == sizes(LLAMA4)
    assert moe_layer_indices(config) == list(range(1, 48, 2))
    assert decoder(LLAMA4) is LLAMA4 and decoder(config) is LLAMA4
    (keys,) = stock_keys(config, 3, {})
    assert keys == {"text_config": {**LLAMA4, "num_experts_per_tok": 3}}
    with pytest.raises(ExpertlyError, match="none of intermediate_size"):
        sizes({"model_type": "llama4", "text_config": None})


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (MIXTRAL, 32),
        (SWITCH, 12),
        (QWEN3_VL, 48),
        ({"model_type": "nemotron_h", "layers_block_type": ["moe", "mlp"]}, 2),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*"}, 3),
        ({"model_type": "llama", "num_hidden_layers": 4}, 4),
        ({"model_type": "gpt2"}, 0),
    ],
)
def test_how_many_layers_a_config_says(config, layers):
    assert num_layers(config) == layers


def test_a_missing_number_of_always_on_experts_is_refused():
    for config in (
        {**DEEPSEEK_V2, "n_shared_experts": None},
        {**ERNIE, "moe_num_shared_experts": None},
    ):
        with pytest.raises(ExpertlyError, match=r"none of \w*_shared_experts is there"):
            sizes(config)


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
        (GPT_OSS_20B, "topk_softmax", {}),
        (QWEN3_VL, "softmax_topk", {"renormalize": True}),
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


# keys that released checkpoints have, of which the classes of today make lists
OLD = ("first_k_dense_replace", "hybrid_override_pattern")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_every_row_fits_our_rules_and_transformers_classes(name):
    row, config = FAMILIES[name], AutoConfig.for_model(name).to_dict()
    assert row.name == name and (row.may_be_dense or family_of(config) is row)
    said = {**decoder(config), **AutoConfig.for_model(name).attribute_map}
    assert set(row.scratch) <= set(said)
    named = (row.shared_experts, row.shared_width, row.expert_width, *row.options.values())
    assert {*filter(None, named), *row.words} <= set(said)
    assert {*row.layers.values()} <= {*said, *OLD}
    assert row.rule in ROUTERS and row.logits in LOGITS and row.answer in ANSWERS
    takes = set(rule_defaults(ROUTERS[row.rule]))
    assert set(row.options) | set(row.fixed) <= takes
    assert (row.bias is not None) == ROUTERS[row.rule].biased
    if row.dense is not None:
        AutoConfig.for_model(row.dense)  # the twin's class is there


def test_no_row_sets_what_no_row_needs():
    """A field of the table that every row leaves at its default would be a dead one."""
    for field in fields(Family):
        if field.name != "name":
            assert len({repr(getattr(row, field.name)) for row in FAMILIES.values()}) > 1, field


@each_released
def test_stock_keys_say_the_familys_own_rule_back(config):
    row, (rule, options) = FAMILIES[config["model_type"]], rule_of(config)
    said = [{**config, **keys} for keys in stock_keys(config, sizes(config).top_k, options)]
    assert (rule, options) in [rule_of(made) for made in said]
    if isinstance(row.top_k, str):
        for keys in stock_keys(config, 3, options):
            assert sizes({**config, **keys}).top_k == 3


@each_released
def test_training_from_scratch_sums_weights_as_released_models_do(config):
    row = FAMILIES[config["model_type"]]
    key = row.options.get("renormalize")
    assert key not in row.scratch or row.scratch[key] == config[key]


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


@pytest.mark.parametrize("config", [GPT_OSS_20B, PHIMOE, JAMBA])
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
