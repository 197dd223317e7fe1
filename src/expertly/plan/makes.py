"""How the blocks of each model type are made, as far as its parameters and its cache go.

A row says what a family's code does and its config does not say; a value that is a word is the
config key that decides. Rows are data; reading.py reads them. The sizes of the experts are in the
family table of floor 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Make:
    """What one model type's blocks are made of. A str is the key that says it."""

    qkv_bias: bool | str = "attention_bias"  # of what makes queries, keys and values
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False  # of dense networks and of shared experts
    head_bias: bool | str = False
    qk_norm: str | None = None  # over a "head", or over "all" of them
    qk_norm_if: str | None = None  # the key that says whether there is one
    sinks: bool = False  # a learned score per head
    norms: int = 2  # of a layer
    norm_bias: bool = False
    router_bias: int = 0  # parameters per expert beside its row: biases of the logits or choice
    expert_bias: bool = False
    shared_gate: bool = False
    window: str = "none"  # which layers look back at a window only: a name in reading.WINDOWS
    defaults: Mapping[str, Any] = field(default_factory=dict)  # class values of keys left out
    experts_as: str | None = None  # the model type in the family table that its experts follow


_LLAMA = Make(mlp_bias="mlp_bias")
_MISTRAL = Make(
    qkv_bias=False,
    out_bias=False,
    window="all",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
_QWEN2 = Make(qkv_bias=True, out_bias=False, window="beyond")
_QWEN3 = Make(qk_norm="head", window="beyond", defaults={"head_dim": 128})
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA2 = Make(norms=4, window="even", defaults={**_GEMMA, "sliding_window": 4096})
_DEEPSEEK_V2 = Make(
    mlp_bias="mlp_bias",
    defaults={
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
    },
)

MAKES: dict[str, Make] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        qk_norm="head",
        window="all but every sixth",
        # released configs leave out even these
        defaults={**_GEMMA2.defaults, "num_attention_heads": 8, "vocab_size": 262_208},
    ),
    "olmo2": Make(qk_norm="all"),
    "granite": _LLAMA,
    "mixtral": replace(_MISTRAL, defaults={"num_key_value_heads": 8}),
    "qwen2_moe": replace(
        _QWEN2,
        qkv_bias="qkv_bias",
        shared_gate=True,
        window="even before",
        defaults={"qkv_bias": True},
    ),
    "qwen3_moe": Make(
        qk_norm="head",
        window="all",
        defaults={"num_key_value_heads": 4, "use_sliding_window": False},
    ),
    "olmoe": Make(qk_norm="all"),
    # DeepSeekMoE-16B, which came with code of its own
    "deepseek": Make(experts_as="deepseek_v2", defaults={"n_shared_experts": 2}),
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": replace(
        _DEEPSEEK_V2,
        mlp_bias=False,
        defaults={
            **_DEEPSEEK_V2.defaults,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
        },
    ),
    "gpt_oss": Make(
        sinks=True,
        router_bias=1,
        expert_bias=True,
        window="even",
        defaults={
            "attention_bias": True,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
        },
    ),
    "granitemoe": Make(),
    "glm4_moe": Make(
        out_bias=False,
        qk_norm="head",
        qk_norm_if="use_qk_norm",
        defaults={"num_key_value_heads": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "ernie4_5_moe": Make(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        head_bias="use_bias",
        router_bias=1,  # the selection bias is a parameter here, elsewhere a buffer
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
    ),
    "phimoe": Make(
        head_bias="lm_head_bias",
        norm_bias=True,
        window="all",
        defaults={"num_key_value_heads": 8},
    ),
}
