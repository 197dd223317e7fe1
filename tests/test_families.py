"""The family table against transformers' own configs, and the twins it describes."""

import pytest
from transformers import AutoConfig

from expertly.errors import ExpertlyError
from expertly.families import (
    FAMILIES,
    dense_keys,
    family_of,
    moe_layer_indices,
    require_family,
    rule_options,
    sizes,
    stock_keys,
)
from expertly.moe.policy import Policy, check_policy
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
RELEASED = {config["model_type"]: config for config in (MIXTRAL, QWEN3_30B, OLMOE, DEEPSEEK_V3)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MIXTRAL, (8, 2, 14336, 0, 0)),
        (QWEN3_30B, (128, 8, 768, 0, 0)),
        (OLMOE, (64, 8, 1024, 0, 0)),
        (DEEPSEEK_V3, (256, 8, 2048, 2048, 3)),
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
    ],
)
def test_which_layers_are_moe_layers(config, layers):
    assert moe_layer_indices(config) == list(layers)


def test_a_second_spelling_is_read_and_a_missing_one_refused():
    other = {**QWEN3_30B, "num_local_experts": 16}
    del other["num_experts"]
    assert sizes(other).num_experts == 16
    del other["num_local_experts"]
    with pytest.raises(ExpertlyError, match="none of num_experts, num_local_experts") as refusal:
        sizes(other)
    assert refusal.value.code == "E305"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MIXTRAL, {"renormalize": True}),
        (QWEN3_30B, {"renormalize": True}),
        (OLMOE, {"renormalize": False}),
        (DEEPSEEK_V3, {"renormalize": True, "num_groups": 8, "topk_groups": 4, "scale": 2.5}),
    ],
)
def test_the_rules_options_come_from_the_config(config, expected):
    assert rule_options(config) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_fits_its_transformers_config_and_our_rule(name):
    row, config = FAMILIES[name], AutoConfig.for_model(name).to_dict()
    assert row.name == name and family_of(config) is row
    assert set(row.scratch) <= set(config)
    named = (row.shared_experts, row.first_dense, row.sparse_step, row.dense_layers)
    assert set(filter(None, named)) <= set(config)
    assert row.rule in ROUTERS
    stated = sizes(config)
    policy = Policy(router=row.rule, top_k=stated.top_k, options=rule_options(config))
    check_policy(policy, stated.num_experts)
    AutoConfig.for_model(row.dense)  # the twin's class is there


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_keys_say_the_familys_own_rule_back(name):
    row, config = FAMILIES[name], RELEASED[name]
    keys = stock_keys(row, row.rule, sizes(config).top_k, rule_options(config))
    assert keys is not None and keys.items() <= config.items()
    changed = stock_keys(row, row.rule, 3, rule_options(config))
    assert sizes({**config, **changed}).top_k == 3


def test_stock_keys_change_what_the_config_can_say():
    keys = stock_keys(FAMILIES["olmoe"], "softmax_topk", 4, {"renormalize": True})
    assert keys == {"num_experts_per_tok": 4, "norm_topk_prob": True}
    assert rule_options({**OLMOE, **keys}) == {"renormalize": True}


@pytest.mark.parametrize(
    ("name", "rule", "options"),
    [
        ("mixtral", "softmax_topk", {"renormalize": False}),  # its code always renormalises
        ("mixtral", "biased_sigmoid_topk", {}),
        ("qwen3_moe", "softmax_topk", {"scale": 2.0}),
        ("olmoe", "topk_softmax", {}),
        ("deepseek_v3", "softmax_topk", {"renormalize": True}),
    ],
)
def test_what_a_config_cannot_say(name, rule, options):
    assert stock_keys(FAMILIES[name], rule, 2, options) is None


@pytest.mark.parametrize(
    ("config", "model_type", "width"),
    [
        (MIXTRAL, "mistral", 2 * 14336),
        (QWEN3_30B, "qwen3", 8 * 768),
        (OLMOE, "olmo2", 8 * 1024),
        (DEEPSEEK_V3, "deepseek_v3", 9 * 2048),
    ],
)
def test_the_twin_is_as_wide_as_what_one_token_uses(config, model_type, width):
    twin = dense_keys(config)
    assert (twin["model_type"], twin["intermediate_size"]) == (model_type, width)
    same = {key: value for key, value in config.items() if twin[key] == value}
    changed = set(config) - set(same) - {"model_type", "intermediate_size"}
    # DeepSeek-V3 is its own dense class: every layer is one of its dense first ones
    assert changed == ({"first_k_dense_replace"} if model_type == "deepseek_v3" else set())
    if changed:
        assert twin["first_k_dense_replace"] == twin["num_hidden_layers"]


def test_an_unknown_family_is_refused_with_the_nearest_name():
    assert family_of({"model_type": "llama"}) is None and family_of({}) is None
    for call in (require_family, sizes, moe_layer_indices, rule_options, dense_keys):
        with pytest.raises(ExpertlyError) as refusal:
            call({"model_type": "qwen4_moe"})
        assert (refusal.value.code, refusal.value.exit_code) == ("E306", 3)
        assert "write qwen3_moe" in str(refusal.value)
