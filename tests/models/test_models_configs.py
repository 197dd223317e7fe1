"""config.json: any content becomes a value or one line that names the field and what is allowed."""

import json
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.models.configs import check_kinds, read_config

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "config.json"


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
}


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(MIXTRAL)), JSON | st.integers(-(2**70), 2**70))
@example("num_hidden_layers", 2**63)
@example("model_type", ["mixtral"])
def test_no_config_raises_anything_else(place, key, value):
    (place.parent / "config.json").write_text(json.dumps({**MIXTRAL, key: value}))
    try:
        read_config(place.parent)
    except ExpertlyError as error:
        assert error.code == "E305"
        assert key in str(error)


def test_a_config_names_the_field_and_what_is_allowed(tmp_path):
    def said(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, **changes}))
        with pytest.raises(ExpertlyError) as error:
            read_config(tmp_path)
        assert (error.value.code, error.value.exit_code) == ("E305", 3)
        return error.value.why

    assert said(num_experts_per_tok=9) == "num_experts_per_tok is 9, but there are 8 experts"
    assert said(num_hidden_layers=-1).endswith("is -1, expected a whole number from 1 to 10000")
    assert said(num_local_experts="8").startswith("num_local_experts is '8', expected")


def test_a_folder_without_a_config_is_no_model(tmp_path):
    for folder, why in ((tmp_path, "no config.json"), (tmp_path / "no", "no such folder")):
        with pytest.raises(ExpertlyError, match=why) as error:
            read_config(folder)
        assert error.value.code == "E305"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\udcff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ExpertlyError) as error:
        read_config(tmp_path)
    assert error.value.code == "E301"


DEEPSEEK = {
    **MIXTRAL,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
}
LLAMA4 = {**MIXTRAL, "model_type": "llama4_text"}
NEMOTRON = {
    **DEEPSEEK,
    "model_type": "nemotron_h",
    "moe_shared_expert_intermediate_size": 16,
    "hybrid_override_pattern": "ME*",
}
NAN = float("nan")


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (MIXTRAL, {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a number from 0 to 1"),
        (MIXTRAL, {"rms_norm_eps": NAN}, "rms_norm_eps is nan, expected a number from 0 to 1"),
        (MIXTRAL, {"rms_norm_eps": True}, "rms_norm_eps is True, expected a number"),
        (MIXTRAL, {"whatever": NAN}, "whatever is nan, expected a finite number"),
        (MIXTRAL, {"rope_theta": 0}, "rope_theta is 0, expected a number from 1 to 1e+12"),
        (
            MIXTRAL,
            {"rope_parameters": {"rope_theta": "x"}},
            "rope_parameters.rope_theta is 'x', expected a number",
        ),
        (
            MIXTRAL,
            {"rope_parameters": {"rope_theta": 1e4, "factor": -1}},
            "rope_parameters.factor is -1, expected",
        ),
        (
            MIXTRAL,
            {"rope_parameters": {"full_attention": {"rope_theta": 0}}},
            "rope_parameters.full_attention.rope_theta is 0",
        ),
        (MIXTRAL, {"rope_parameters": 3}, "rope_parameters is 3, expected an object"),
        (MIXTRAL, {"head_dim": 2**40}, "head_dim is 1099511627776, expected a whole number from 1"),
        (MIXTRAL, {"num_labels": 2**63}, "num_labels is 9223372036854775808, expected a whole"),
        (
            MIXTRAL,
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads is 3, expected a divisor of 4 attention heads",
        ),
        (
            DEEPSEEK,
            {"num_attention_heads": 4, "num_key_value_heads": 1},
            "num_key_value_heads is 1, expected 4 as num_attention_heads is",
        ),
        (
            DEEPSEEK,
            {"head_dim": 8, "qk_rope_head_dim": 4},
            "head_dim is 8, expected 4 as qk_rope_head_dim is",
        ),
        (MIXTRAL, {"dtype": "int8"}, "dtype is 'int8', expected one of float64, float32"),
        (MIXTRAL, {"model_type": None}, "model_type is None, expected the name of a family"),
        (DEEPSEEK, {"n_group": 3}, "n_group is 3, expected groups of two or more of 8 experts"),
        (DEEPSEEK, {"n_group": 8}, "n_group is 8, expected groups of two or more of 8 experts"),
        (DEEPSEEK, {"n_group": None}, "n_group is None, expected a whole number from 1 to 8"),
        (DEEPSEEK, {"topk_group": 5}, "topk_group is 5, expected a whole number from 1 to 4"),
        (
            DEEPSEEK,
            {"topk_group": 1},
            "num_experts_per_tok is 4, more than 1 groups hold",
        ),
        (DEEPSEEK, {"n_shared_experts": None}, "n_shared_experts is None, expected a whole number"),
        (QWEN3, {"mlp_only_layers": 3}, "mlp_only_layers is 3, expected a list of layers"),
        (QWEN3, {"mlp_only_layers": [0, "1"]}, "mlp_only_layers is [0, '1'], expected a list of"),
        (QWEN3, {"mlp_only_layers": [-1]}, "mlp_only_layers is [-1], expected a list of layers"),
        (QWEN3, {"mlp_only_layers": [True]}, "mlp_only_layers is [True], expected a list of"),
        (LLAMA4, {"moe_layers": [1, None]}, "moe_layers is [1, None], expected a list of layers"),
        (
            NEMOTRON,
            {"layers_block_type": ["moe", {}]},
            "layers_block_type is ['moe', {}], expected",
        ),
        (
            NEMOTRON,
            {"hybrid_override_pattern": 3},
            "hybrid_override_pattern is 3, expected a letter",
        ),
        (
            MIXTRAL,
            {"transformers_weights": "../other.safetensors"},
            "transformers_weights names other weights than the folder's own",
        ),
        (
            MIXTRAL,
            {"_attn_implementation_internal": "evil/kernel:run"},
            "_attn_implementation_internal is 'evil/kernel:run', expected a name without code",
        ),
        (
            MIXTRAL,
            {"sub": [{"experts_implementation": "evil/kernel"}]},
            "experts_implementation is 'evil/kernel', expected a name without code",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_an_impossible_value_is_named_with_what_is_allowed(base, changes, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert read_config(tmp_path) == base
    (tmp_path / "config.json").write_text(json.dumps({**base, **changes}))
    with pytest.raises(ExpertlyError) as error:
        read_config(tmp_path)
    assert (error.value.code, error.value.fix) == ("E305", "correct config.json")
    assert error.value.why.startswith(said)


def test_values_that_real_models_have_are_taken(tmp_path):
    real = {
        "attn_implementation": "flash_attention_2",
        "_attn_implementation_autoset": True,
        "_name_or_path": "org/name",
        "sliding_window": None,
        "dtype": "bfloat16",
        "torch_dtype": "torch.float16",
        "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.707, "beta_fast": 32},
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-06,
        "time_step_limit": [0.0, float("inf")],
    }
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, **real}))
    assert read_config(tmp_path) == {**MIXTRAL, **real}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({**MIXTRAL, "model_type": "hunyuan_v1_moe", "num_experts": 8}, {"moe_topk": [2, 2]}),
        (
            QWEN3,
            {"num_experts": None, "num_local_experts": 8},
        ),  # the other spelling is the good one
        (DEEPSEEK, {"n_shared_experts": 0}),
    ],
)
def test_keys_that_a_family_does_not_read_are_not_checked(config, changes, tmp_path):
    config = {"n_group": False, **config, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


def test_groups_that_a_config_leaves_to_the_class_are_taken(tmp_path):
    config = {key: value for key, value in DEEPSEEK.items() if "group" not in key}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


def test_a_config_of_megabytes_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ExpertlyError, match="1073741824 bytes, more than") as error:
        read_config(tmp_path)
    assert error.value.code == "E301"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "x.bin", "expertly/policy"])
def test_a_pipe_is_refused_and_not_waited_for(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ExpertlyError, match="is a pipe or device, not a file") as error:
        check_kinds(tmp_path)
    assert (error.value.code, error.value.what) == ("E301", str(tmp_path / name))


def test_links_to_files_are_files(tmp_path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sub").mkdir()
    check_kinds(tmp_path)
    (tmp_path / "null.json").symlink_to("/dev/null")
    with pytest.raises(ExpertlyError, match=r"null\.json: is a pipe or device"):
        check_kinds(tmp_path)


def test_a_folder_in_a_files_place_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ExpertlyError, match="is a folder, not a file") as error:
        read_config(tmp_path)
    assert error.value.code == "E301"
