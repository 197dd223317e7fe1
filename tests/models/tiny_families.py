"""Tiny random models of every MoE family that the installed transformers has, found by its source.

A family's directory has a class under `@use_experts_implementation`, or a config with experts. Its
model types are those that an auto class opens and whose config says how many experts there are, by
itself or in a part.
"""

import re
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*?^class (\w+)", re.M | re.S)
SAYS_EXPERTS = re.compile(
    r"^    (moe_num_experts|num_experts|num_local_experts|n_routed_experts):", re.M
)
MODEL_TYPE = re.compile(r"^    model_type = \"(.+)\"", re.M)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# config keys of every family, text or other, and the sizes that tiny models have
SMALL = {
    "vocab_size": 300,
    **dict.fromkeys(("hidden_size", "d_model", "text_hidden_size", "embed_dim"), 32),
    **dict.fromkeys(("out_hidden_size", "output_dim", "projector_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("dense_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layers"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "swa_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "max_seq_len"), 64),
    "initializer_range": 0.2,
    **dict.fromkeys(EXPERTS, 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "zero_expert_num"), 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(
        ("shared_experts_intermediate_size", "share_expert_dim", "moe_hidden_size"), 24
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "index_n_heads": 2,
    "index_head_dim": 16,
    **dict.fromkeys(("index_topk", "sliding_window", "sliding_window_size"), 8),
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "downsample_hidden_size": 16,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
# an attention layer last, because a cache asks it how long the past is
HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
SAM = {"output_channels": 16, "downsample_channels": [16, 32], "mlp_dim": 48, "image_size": 64}
SAM |= {"global_attn_indexes": [1], "window_size": 2}
# what the sizes above leave too large, or a config refuses; refused families are never built
PATCHES: dict[str, dict] = {
    "bailing_hybrid": HYBRID,
    "deepseek_ocr2_sam_vision_model": SAM,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 3},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {"head_dim": 128},
    "glm5_next_text": {**HYBRID, "index_kpool": 2, "qk_rope_head_dim": 0},
    "granitemoehybrid": {**HYBRID, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
    "llama4_vision_model": {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "mistral4": {"head_dim": 16},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 24,
    },
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {
        **HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "unlimited_ocr_sam_vision_model": SAM,
}


def experts_classes() -> dict[str, list[str]]:
    """Per directory of transformers' models its decorated experts classes."""
    found = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        if names := DECORATED.findall(file.read_text(encoding="utf-8")):
            found[file.parent.name] = names
    return found


def model_types(directory: str) -> list[str]:
    """The model types of a directory that an auto class opens and whose config says experts."""
    names = MODEL_TYPE.findall(_configs(MODELS / directory))
    return [name for name in names if name in CONFIG_MAPPING and model_class(name) and _says(name)]


def families() -> dict[str, list[str]]:
    """The MoE model types of transformers, by their directory."""
    with_experts = {path.name for path in MODELS.iterdir() if SAYS_EXPERTS.search(_configs(path))}
    return {name: model_types(name) for name in sorted({*experts_classes(), *with_experts})}


def _configs(directory: Path) -> str:
    files = directory.glob("configuration_*.py")
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _says(model_type: str) -> bool:
    return _holds(CONFIG_MAPPING[model_type]().to_dict())


def _holds(said: dict) -> bool:
    parts = [value for value in said.values() if isinstance(value, dict)]
    return any(key in said for key in EXPERTS) or any(map(_holds, parts))


def tiny_config(model_type: str, *, part: str | None = None, **changes):
    """A config of a family with small sizes; changes: keys of it, or of a part of it."""
    config = AutoConfig.for_model(model_type, **_small(model_type))
    changed = getattr(config, part) if part else config
    for key, value in changes.items():
        setattr(changed, key, value)
    return config


def _small(model_type: str) -> dict:
    made = CONFIG_MAPPING[model_type]
    known = made().to_dict()
    small = {key: value for key, value in SMALL.items() if key in known}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "mlp_layer_types" in known:
        small["mlp_layer_types"] = ["dense", "sparse", "sparse"]
    for name in getattr(made, "sub_configs", {}):
        if part := (known.get(name) or {}).get("model_type"):
            small[name] = _small(part)
    return {**small, **PATCHES.get(model_type, {})}


def model_class(model_type: str):
    """The class with a head that an auto class opens a model type with; None if none does."""
    heads = ["CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM"]
    if "vision_config" in CONFIG_MAPPING[model_type].sub_configs:
        heads.remove("CAUSAL_LM")  # some open the decoder alone
    tables = [
        getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {})
        for head in (*heads, "TOKEN_CLASSIFICATION")
    ]
    name = next((table[model_type] for table in tables if model_type in table), None)
    return getattr(transformers, name) if name else None


def tiny_family(model_type: str, *, seed: int = 0, **changes):
    """A random model of a family in float32 and evaluation mode, the same every time."""
    torch.manual_seed(seed)
    model = model_class(model_type)(tiny_config(model_type, **changes)).eval()
    draw_routers(model)
    return model


@torch.no_grad()
def draw_routers(model):
    """Draw what lies beside the experts, since many routers and every bias begin as zeros."""
    blocks = [m for m in model.modules() if hasattr(m, "experts") or hasattr(m, "router")]
    drawn = torch.Generator().manual_seed(1)
    for block in blocks:
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if re.match(r"(experts|shared\w*)\.", name) or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=drawn)
            if "bias" in name:
                tensor.copy_(noise * 0.1)
            else:  # a matrix, or a scale
                tensor.copy_(noise * 0.3 if tensor.dim() > 1 else 1 + noise * 0.2)
