"""Which stock MoE says which dense model: the whole matrix, and the reason for every no."""

import itertools

import pytest

from expertly.errors import ExpertlyError
from expertly.families import FAMILIES
from expertly.models.build import ModelShape, model_config, moe_config, own_keys
from expertly.upcycle.targets import DENSE, TARGETS, biases, choose_target, target_keys, windows

SLIDES = {"sliding_window": 16, "use_sliding_window": True}
ALL = {**SLIDES, "layer_types": ["sliding_attention"] * 2}
SOME = {**SLIDES, "layer_types": ["sliding_attention", "full_attention"]}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def shape(make, **keys) -> ModelShape:
    return model_config(make, {**SIZES, **keys})


def raw(make, **keys):
    return own_keys(shape(make, **keys))


def chosen(config, asked="", *, every=1, shared=False) -> str:
    """The target's name, or the error."""
    try:
        return choose_target(config, asked, every=every, shared=shared).name
    except ExpertlyError as error:
        return str(error)


PLAIN = {"": "mixtral", "every": "qwen2_moe", "shared": "qwen2_moe", "both": "qwen2_moe"}
NORMED = {"": "qwen3_moe", "every": "qwen3_moe", "shared": None, "both": None}
BIASED = dict.fromkeys(("", "every", "shared", "both"), "qwen2_moe")
NONE = dict.fromkeys(("", "every", "shared", "both"))
MATRIX = [
    ("llama", {}, PLAIN),
    ("llama", {"tie_word_embeddings": True}, PLAIN),
    ("llama", {"attention_bias": True}, NONE),
    ("llama", {"mlp_bias": True}, NONE),
    ("mistral", {"sliding_window": None}, PLAIN),
    ("mistral", {"sliding_window": 16}, PLAIN),
    ("gemma", {}, PLAIN),
    ("gemma", {"attention_bias": True}, NONE),
    ("gemma", {"use_bidirectional_attention": True}, NONE),
    ("qwen2", {}, BIASED),
    ("qwen2", ALL, BIASED),
    ("qwen2", SOME, BIASED),
    ("qwen3", {}, NORMED),
    ("qwen3", {"attention_bias": True}, NORMED),
    ("qwen3", ALL, NORMED),
    ("qwen3", SOME, NONE),
    ("olmo2", {}, {**NONE, "": "flex_olmo"}),
    ("olmo2", {"attention_bias": True}, {**NONE, "": "flex_olmo"}),
]
OPTIONS = {"": {}, "every": {"every": 2}, "shared": {"shared": True}}
OPTIONS["both"] = {"every": 2, "shared": True}


@pytest.mark.parametrize(("make", "keys", "wanted"), MATRIX)
def test_the_target_of_every_make_and_option(make, keys, wanted):
    for option, given in OPTIONS.items():
        found = chosen(raw(make, **keys), **given)
        if wanted[option]:
            assert found == wanted[option], option
        else:
            assert found.startswith(
                f"error[E306] model_type '{make}': no stock MoE says it exactly"
            )
    assert {make for make, *_ in MATRIX} == set(DENSE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", DENSE)
def test_a_target_that_is_asked_for_is_taken_or_refused_by_its_own_reason(make, target):
    fits = {
        "llama": {"mixtral", "qwen2_moe"},
        "mistral": {"mixtral", "qwen2_moe"},
        "gemma": {"mixtral", "qwen2_moe"},
        "qwen2": {"qwen2_moe"},
        "qwen3": {"qwen3_moe"},
        "olmo2": {"flex_olmo"},
    }[make]
    found = chosen(raw(make), target)
    assert found == target if target in fits else found.startswith(f"error[E202] target {target}: ")


@pytest.mark.parametrize(
    ("make", "keys", "given", "said"),
    [
        ("llama", {"mlp_bias": True}, {}, "its experts have no biases, the feed-forward has"),
        ("llama", {"attention_bias": True}, {}, "attention biases: all, it has none or qkv"),
        ("llama", {}, {"asked": "olmoe"}, "E202.*qk-norm: none, it has width"),
        ("llama", {}, {"asked": "mixtral", "every": 2}, "E202.*all of its layers have experts"),
        ("llama", {}, {"asked": "mixtral", "shared": True}, "E202.*it has no shared expert"),
        ("llama", {}, {"asked": "mixtrall"}, "E202.*'mixtrall' is none of ours. FIX: write mixtr"),
        ("llama", {}, {"asked": "deepseek_v3"}, "E202.*is none of ours"),
        ("qwen2", {}, {"asked": "mixtral"}, "E202.*attention biases: qkv, it has none"),
        ("qwen3", {}, {"shared": True}, "E306.*qwen3_moe: it has no shared expert"),
        ("qwen3", SOME, {}, "E306.*attention slides in some layers, its in none or all"),
        ("olmo2", {}, {"every": 2}, "E306.*flex_olmo: all of its layers have experts"),
        ("gemma", {"use_bidirectional_attention": True}, {}, "E306.*its attention looks back only"),
    ],
)
def test_the_reason_of_a_refusal(make, keys, given, said):
    with pytest.raises(ExpertlyError, match=said):
        choose_target(raw(make, **keys), **{"asked": "", "every": 1, "shared": False, **given})


def test_whoever_asks_says_how_to_ask_for_none():
    with pytest.raises(ExpertlyError, match=r"E202.*FIX: leave it out of there$"):
        choose_target(raw("qwen3"), "mixtral", every=1, shared=False, fix="leave it out of there")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_an_moe_is_no_dense_model(family):
    found = chosen({"model_type": family})
    assert found.startswith(f"error[E306] model_type '{family}': an MoE already, expected a dense")


@pytest.mark.parametrize("make", ["gemma2", "gemma3_text", "phi3", "gpt2", "olmo"])
def test_a_make_that_is_not_read_names_those_that_are(make):
    assert chosen({"model_type": make}) == (
        f"error[E306] model_type '{make}': not a dense make that is read (llama, mistral, qwen2, "
        "qwen3, gemma, olmo2). FIX: name a model of one of these"
    )


@pytest.mark.parametrize(
    ("make", "keys", "wanted"),
    [
        ("llama", {}, ("none", "none")),
        ("llama", {"attention_bias": True}, ("all", "none")),
        ("mistral", {"sliding_window": 4096}, ("none", "all")),
        ("qwen2", {}, ("qkv", "none")),
        ("qwen2", SOME, ("qkv", "some")),
        ("qwen3", ALL, ("none", "all")),
    ],
)
def test_biases_and_windows(make, keys, wanted):
    assert (biases(raw(make, **keys)), windows(raw(make, **keys))) == wanted


def test_keys_of_other_classes_in_a_file_mean_nothing():
    """Llama's attention never slides, whatever its config.json says; Mixtral's would."""
    stray = shape("llama")
    stray.sliding_window, stray.qkv_bias, stray.num_local_experts = 16, True, 3
    assert windows(own_keys(stray)) == "none"
    made = moe_config(stray, "mixtral", {"num_experts": 4, "num_experts_per_tok": 2})
    assert (made.sliding_window, made.num_local_experts) == (None, 4)


# --- The target's keys -------------------------------------------------------------------------

FIT = [
    (make, keys, option, wanted[option])
    for (make, keys, wanted), option in itertools.product(MATRIX, OPTIONS)
    if wanted[option]
]


@pytest.mark.parametrize(("make", "keys", "option", "target"), FIT)
def test_every_key_is_one_of_the_targets(make, keys, option, target):
    layers = [1] if OPTIONS[option].get("every") else [0, 1]
    dense = shape(make, **keys)
    made = target_keys(own_keys(dense), TARGETS[target], layers)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = moe_config(dense, target, {**sizes, **made})
    # Qwen3-MoE's files have the last, and its class no longer reads it
    known = type(config)().to_dict().keys() | {"head_dim", "max_window_layers"}
    assert set(made) <= known
    assert all(getattr(config, key) == value for key, value in made.items())
    for key in SIZES.keys() - {"intermediate_size"}:
        assert getattr(config, key) == getattr(dense, key)
    for key in ("rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_parameters"):
        assert getattr(config, key) == getattr(dense, key), key


def test_keys_by_hand():
    both = [0, 1]
    assert target_keys(raw("llama"), TARGETS["mixtral"], both) == {"head_dim": 8}
    assert target_keys(raw("llama", head_dim=16), TARGETS["mixtral"], both) == {"head_dim": 16}
    gemma = target_keys(raw("gemma", head_dim=8), TARGETS["mixtral"], both)
    assert gemma == {"head_dim": 8, "tie_word_embeddings": False}
    assert target_keys(raw("qwen3", head_dim=8), TARGETS["qwen3_moe"], [1]) == {
        "head_dim": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "intermediate_size": 48,
    }
    shared = target_keys(raw("mistral", sliding_window=16), TARGETS["qwen2_moe"], both)
    assert shared == {
        "head_dim": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "qkv_bias": False,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * 2,
    }
    some = target_keys(raw("qwen2", **SOME), TARGETS["qwen2_moe"], both)
    assert (some["qkv_bias"], some["max_window_layers"], "layer_types" in some) == (True, 2, False)


def test_every_target_is_a_family_whose_weights_can_be_renormalised():
    for name in TARGETS:
        assert name in FAMILIES
        made = moe_config(shape("llama"), name, {"num_experts": 4, "num_experts_per_tok": 2})
        assert made.model_type == name
