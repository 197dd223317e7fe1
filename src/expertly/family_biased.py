"""The rows of the families whose routers have a selection bias: DeepSeek-V3's make, and others."""

from dataclasses import replace

from expertly.family_row import Family

NORM = {"renormalize": "norm_topk_prob"}
GROUPS = {"num_groups": "n_group", "topk_groups": "topk_group", "scale": "routed_scaling_factor"}
# a list says which layers are dense; what its makers write says how many come first
TYPES = {"types": "mlp_layer_types", "first": "first_k_dense_replace"}
SHARED = "shared_expert_intermediate_size"
SCALE = {"scale": "routed_scaling_factor"}
ORDERED = {"ordered": True}

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    dense="deepseek_v3",
    num_experts=("n_routed_experts", "num_local_experts"),
    shared_experts="n_shared_experts",
    layers={"first": "first_k_dense_replace"},
    rule="biased_sigmoid_topk",
    options={**NORM, **GROUPS},
    bias="gate.e_score_correction_bias",
    # no groups, no extra prediction modules: at small sizes both are only in the way
    scratch={
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
)
_DOTS1 = replace(
    DEEPSEEK_V3,
    name="dots1",
    dense="dots1",
    scratch={
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
    },
)
_GLM4_MOE = replace(DEEPSEEK_V3, name="glm4_moe", dense="glm4_moe")
_TYPED = replace(DEEPSEEK_V3, dense=None, layers=TYPES, scratch={})
_KIMI_LINEAR = replace(
    _TYPED,
    name="kimi_linear",
    dense="kimi_linear",
    num_experts=("num_experts",),
    top_k="num_experts_per_token",
    shared_experts="num_shared_experts",
    options={**GROUPS, "num_groups": "num_expert_group", "renormalize": "moe_renormalize"},
)
_DEEPSEEK_V4 = replace(
    _TYPED,
    name="deepseek_v4",
    shared_experts=None,  # its config counts them, its code has one
    shared_width="moe_intermediate_size",
    unless="is_hash",  # token ids choose there
    rule="biased_sqrtsoftplus_topk",
    options=SCALE,
    words={"scoring_func": {"sqrtsoftplus": {}, "sigmoid": {"rule": "biased_sigmoid_topk"}}},
)
_INKLING2 = replace(
    _DEEPSEEK_V4,
    name="inkling2_text",
    shared_width=None,
    layers={},
    unless=None,
    rule="biased_sigmoid_topk",
    options={"scale": "route_scale"},
    words={"scoring_func": {"sigmoid": {}, "sqrtsoftplus": {"rule": "biased_sqrtsoftplus_topk"}}},
)
_MINIMAX_M2 = Family(
    name="minimax_m2",
    num_experts=("num_local_experts",),
    expert_width="intermediate_size",
    rule="biased_sigmoid_topk",
    bias="e_score_correction_bias",
)
_MINIMAX_M3 = replace(
    _MINIMAX_M2,
    name="minimax_m3_vl_text",
    dense="minimax_m3_vl_text",
    dense_width="dense_intermediate_size",
    shared_width="shared_intermediate_size",
    layers=TYPES,
    bias="gate.e_score_correction_bias",
)

BIASED = (
    DEEPSEEK_V3,
    _DOTS1,
    _GLM4_MOE,
    replace(_GLM4_MOE, name="glm4v_moe", dense=None, nested="text_config", scratch={}),
    replace(_TYPED, name="axk1"),
    replace(_TYPED, name="axk2", fixed={"closed": 0.0}),
    replace(_TYPED, name="deepseek_v32", dense="deepseek_v32"),
    replace(
        _TYPED,
        name="dots3_note_text",
        dense="dots3_note_text",
        shared_width="shared_experts_intermediate_size",
    ),
    replace(_TYPED, name="glm4_moe_lite", dense="glm4_moe_lite"),
    replace(_TYPED, name="glm_moe_dsa", dense="glm_moe_dsa"),
    replace(_TYPED, name="hy_v4", dense="hy_v4"),
    replace(_TYPED, name="mimo_v2_flash", dense="mimo_v2_flash", shared_experts=None),
    replace(_TYPED, name="solar_open", layers={}),
    replace(_TYPED, name="glm5_next", nested="text_config"),
    replace(
        _TYPED,
        name="nemotron_h",
        shared_experts=None,  # its config counts them, its code has one
        shared_width="moe_shared_expert_intermediate_size",
        layers={"types": "layers_block_type", "pattern": "hybrid_override_pattern"},
        may_be_dense=True,
    ),
    replace(
        _TYPED,
        name="exaone_moe",
        dense="exaone_moe",
        num_experts=("num_experts",),
        shared_experts="num_shared_experts",
    ),
    replace(  # the block scales what the experts answer
        _TYPED,
        name="beam",
        dense="beam",
        num_experts=("num_experts",),
        shared_experts=None,
        options={**NORM, "num_groups": "n_group", "topk_groups": "topk_group"},
        fixed=ORDERED,
    ),
    _KIMI_LINEAR,
    replace(_KIMI_LINEAR, name="bailing_hybrid", dense="bailing_hybrid"),
    _DEEPSEEK_V4,
    _INKLING2,
    replace(_INKLING2, name="inkling2", nested="text_config"),
    replace(
        _TYPED,
        name="muse_spark",
        nested="text_config",
        num_experts=("num_local_experts",),
        shared_experts=None,
        options=SCALE,
        fixed={"epsilon": 1e-15},
        logits="multiplied",
    ),
    _MINIMAX_M2,
    _MINIMAX_M3,
    replace(_MINIMAX_M3, name="minimax_m3_vl", dense=None, nested="text_config"),
    replace(
        _MINIMAX_M3,
        name="step3p7",
        dense=None,
        nested="text_config",
        num_experts=("n_routed_experts",),
        expert_width="moe_intermediate_size",
        dense_width="intermediate_size",
        shared_width="share_expert_dim",
    ),
    replace(
        _MINIMAX_M2,
        name="hy_v3",
        dense="hy_v3",
        num_experts=("num_experts",),
        expert_width="moe_intermediate_size",
        shared_experts="num_shared_experts",
        layers=TYPES,
        options={"scale": "router_scaling_factor"},
    ),
    replace(
        _MINIMAX_M2,
        name="afmoe",
        dense="afmoe",
        num_experts=("num_experts",),
        expert_width="moe_intermediate_size",
        shared_experts="num_shared_experts",
        layers={"first": "num_dense_layers"},
        router="router",
        options={"scale": "route_scale"},
        fixed=ORDERED,
        bias="expert_bias",
        logits="gate",
    ),
    replace(
        _MINIMAX_M2,
        name="lfm2_moe",
        dense="lfm2_moe",
        num_experts=("num_experts",),
        expert_width="moe_intermediate_size",
        layers={"first": "num_dense_layers"},
        options={**NORM, **SCALE},
        fixed={**ORDERED, "epsilon": 1e-6},
        words={"use_expert_bias": {True: {}}},
        bias="expert_bias",
    ),
    replace(
        _TYPED,
        name="laguna",
        dense="laguna",
        num_experts=("num_experts",),
        shared_experts=None,
        shared_width=SHARED,
        options={},
        fixed=ORDERED,
        logits="softcapped",
    ),
    replace(
        _TYPED,
        name="kolibri1",
        num_experts=("num_local_experts", "num_experts"),
        shared_experts=None,
        shared_width=SHARED,
        layers={},
        rule="biased_topk_sigmoid",
        options=NORM,
    ),
    Family(
        name="ernie4_5_moe",
        dense="ernie4_5",
        num_experts=("moe_num_experts", "num_experts"),
        top_k="moe_k",
        shared_experts="moe_num_shared_experts",
        layers={
            "first": "moe_layer_start_index",
            "last": "moe_layer_end_index",
            "step": "moe_layer_interval",
        },
        rule="biased_softmax_topk",
        options={"minimum": "moe_norm_min"},
        bias="gate.moe_statics.e_score_correction_bias",
    ),
)
