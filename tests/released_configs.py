"""Configs shaped as released ones: the keys that rows read, and some that look alike."""

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
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
}
GPT_OSS_120B = {**GPT_OSS_20B, "num_local_experts": 128, "num_hidden_layers": 36}
GRANITE = {
    "model_type": "granitemoe",
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "intermediate_size": 512,
    "num_hidden_layers": 24,
}
GLM45_AIR = {
    "model_type": "glm4_moe",
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
    "num_hidden_layers": 46,
}
DOTS1 = {
    "model_type": "dots1",
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 62,
}
FLEX_OLMO = {
    "model_type": "flex_olmo",
    "num_experts": 7,
    "num_experts_per_tok": 7,  # all of them
    "intermediate_size": 11008,
    "norm_topk_prob": False,
    "num_hidden_layers": 32,
}
MINIMAX_M2 = {
    "model_type": "minimax_m2",
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "intermediate_size": 1536,
    "shared_intermediate_size": 0,
    "router_jitter_noise": 0.0,
    "num_hidden_layers": 62,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
}
QWEN3_VL = {
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {"model_type": "qwen3_vl_moe", "depth": 27, "hidden_size": 1152},
}
NEMOTRON_3 = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "intermediate_size": 1856,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "n_groups": 8,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "num_hidden_layers": 52,
}
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
    "moe_intermediate_size": [3072] * 32,
    "num_shared_expert": [1] * 32,
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
GEMMA4 = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
    },
}
SWITCH = {"model_type": "switch_transformers", "num_experts": 8, "d_ff": 2048, "num_layers": 12}
RELEASED = (
    MIXTRAL,
    QWEN3_30B,
    OLMOE,
    DEEPSEEK_V3,
    QWEN2,
    DEEPSEEK_V2,
    GPT_OSS_20B,
    GPT_OSS_120B,
    GRANITE,
    GLM45_AIR,
    DOTS1,
    FLEX_OLMO,
    MINIMAX_M2,
    QWEN3_NEXT,
    QWEN3_VL,
    NEMOTRON_3,
    ERNIE,
    PHIMOE,
    JAMBA,
    HUNYUAN,
    LLAMA4,
    SWITCH,
    GEMMA4,
)
