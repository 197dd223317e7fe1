"""The family table: a row per MoE family of transformers, and those that are refused.

Rows are data; families.py reads them. A family of another's make is that row with what differs.
"""

from dataclasses import replace

from expertly.family_biased import BIASED, DEEPSEEK_V3, GROUPS, NORM, SHARED, TYPES
from expertly.family_row import Family

_SHARED_MLP = "shared_intermediate_size"
_STEPS = {"step": "decoder_sparse_step", "dense": "mlp_only_layers"}
_MIXTRAL = Family(
    name="mixtral",
    dense="mistral",
    num_experts=("num_local_experts",),
    expert_width="intermediate_size",
    fixed={"renormalize": True},
)
_QWEN3_MOE = Family(
    name="qwen3_moe",
    dense="qwen3",
    num_experts=("num_experts", "num_local_experts"),
    layers=_STEPS,
    options=NORM,
    scratch={"norm_topk_prob": True},
)
_QWEN2_MOE = replace(_QWEN3_MOE, name="qwen2_moe", dense="qwen2", shared_width=SHARED, scratch={})
_OLMOE = Family(
    name="olmoe",
    dense="olmo2",
    num_experts=("num_experts",),
    expert_width="intermediate_size",
    options=NORM,
)
_GRANITEMOE = replace(
    _MIXTRAL, name="granitemoe", dense="granite", router="router", rule="topk_softmax", fixed={}
)
_LLAMA4_TEXT = Family(
    name="llama4_text",
    dense="llama4_text",
    num_experts=("num_local_experts",),
    expert_width="intermediate_size",
    dense_width="intermediate_size_mlp",
    shared_width="intermediate_size",
    layers={"listed": "moe_layers", "step": "interleave_moe_layer_step"},
    router="router",
    rule="topk_sigmoid",
    answer="scores",
)
_GREEDY = {"greedy": {"num_groups": 1, "topk_groups": 1}, "group_limited_greedy": {}}
_DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    name="deepseek_v2",
    dense="deepseek_v2",
    rule="softmax_topk",
    options=GROUPS,
    fixed={"renormalize": False, "ordered": False},
    words={"topk_method": _GREEDY},
    bias=None,
    scratch={"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
)
_OCR = replace(
    _DEEPSEEK_V2, name="deepseek_ocr2", dense=None, nested="text_config", layers=TYPES, scratch={}
)
_MISTRAL4 = replace(
    _DEEPSEEK_V2,
    name="mistral4",
    dense="mistral4",
    options={**NORM, **GROUPS},
    fixed={"best": 2, "ordered": False},
    words={},
    scratch={},
)
_QWEN3_5_MOE = replace(
    _QWEN2_MOE,
    name="qwen3_5_moe_text",
    dense="qwen3_5_text",
    layers={},
    options={},
    fixed={"renormalize": True},
)
_QWEN4_EXP = replace(_QWEN2_MOE, name="qwen4_exp_text", dense=None, layers={})
_ARIA_TEXT = replace(
    _GRANITEMOE,
    name="aria_text",
    dense=None,
    num_experts=("moe_num_experts",),
    top_k="moe_topk",
    shared_experts="moe_num_shared_experts",
)
_GEMMA4_TEXT = Family(
    name="gemma4_text",
    may_be_dense=True,
    num_experts=("num_experts",),
    top_k="top_k_experts",
    dense_width="moe_intermediate_size",  # no layer is a dense one
    shared_width="intermediate_size",  # each layer has an ordinary feed-forward beside its experts
    router="router",
    fixed={"renormalize": True},
    logits="normed",
    answer="scaled",
)

FAMILIES = {
    row.name: row
    for row in (
        _MIXTRAL,
        replace(
            _MIXTRAL, name="gpt_oss", dense=None, router="router", rule="topk_softmax", fixed={}
        ),
        _GRANITEMOE,
        replace(_GRANITEMOE, name="granitemoe_swa", dense=None, shared_width=_SHARED_MLP),
        replace(_GRANITEMOE, name="granitemoeshared", shared_width=_SHARED_MLP),
        replace(
            _GRANITEMOE,
            name="granitemoehybrid",
            dense=None,
            shared_width=_SHARED_MLP,
            may_be_dense=True,
        ),
        _ARIA_TEXT,
        replace(_ARIA_TEXT, name="aria", nested="text_config"),
        replace(_MIXTRAL, name="minimax", dense=None),
        replace(
            _OLMOE,
            name="cohere2_moe",
            dense="cohere2_moe",
            dense_width="prefix_dense_intermediate_size",
            shared_experts="num_shared_experts",
            layers=TYPES,
            rule="topk_sigmoid",
            words={
                "expert_selection_fn": {
                    "softmax": {"rule": "topk_softmax", "renormalize": None},
                    "sigmoid": {"of_all": False},
                }
            },
        ),
        _GEMMA4_TEXT,
        replace(_GEMMA4_TEXT, name="gemma4", nested="text_config"),
        replace(
            _MIXTRAL,
            name="phimoe",
            dense=None,  # layer norms with biases: no dense class has them
            router="router",
            rule="sparsemixer",
            options={"tolerance": "router_jitter_noise"},
            fixed={},
        ),
        replace(
            _MIXTRAL,
            name="hunyuan_v1_moe",
            dense="hunyuan_v1_dense",
            num_experts=("num_experts",),
            top_k="moe_topk",
            shared_width="intermediate_size",
            logits="wg",
        ),
        _OLMOE,
        replace(_OLMOE, name="flex_olmo"),
        replace(
            _OLMOE,
            name="jamba",
            may_be_dense=True,
            dense=None,  # every second layer is a dense one, of another width than a token uses
            layers={"step": "expert_layer_period", "offset": "expert_layer_offset"},
            router="router",
            options={},
            fixed={"renormalize": False},
        ),
        _QWEN3_MOE,
        _QWEN2_MOE,
        _QWEN3_5_MOE,
        replace(_QWEN3_5_MOE, name="qwen3_5_moe", dense=None, nested="text_config"),
        _QWEN4_EXP,
        replace(_QWEN4_EXP, name="qwen4_exp", nested="text_config"),
        replace(
            _QWEN3_MOE,
            name="qwen3_vl_moe",
            dense=None,
            nested="text_config",
            options={},
            fixed={"renormalize": True},
            scratch={},
        ),
        replace(
            _QWEN3_MOE, name="qwen3_omni_moe_thinker", dense=None, nested="text_config", scratch={}
        ),
        replace(_QWEN2_MOE, name="flint", dense=None, rule="sigmoid_topk"),
        replace(_QWEN3_MOE, name="mellum", dense="mellum", layers=TYPES),
        replace(_QWEN2_MOE, name="qwen3_next", dense="qwen3_next"),
        _DEEPSEEK_V2,
        _OCR,
        replace(_OCR, name="unlimited_ocr"),
        _MISTRAL4,
        replace(
            _MISTRAL4,
            name="mistral_large4",
            dense=None,
            nested="text_config",
            layers=TYPES,
            options=GROUPS,
            fixed={"renormalize": True, "best": 2, "ordered": False},
        ),
        _LLAMA4_TEXT,
        replace(_LLAMA4_TEXT, name="llama4", dense=None, nested="text_config"),
        Family(
            name="switch_transformers",
            num_experts=("num_experts",),
            top_k=1,
            expert_width="d_ff",
            dense_width="d_ff",
            router="router",
            rule="switch_top1",
            logits="classifier",
            answer="one_hot",
            only_own="its experts take one expert per token, as Switch's own router says it",
        ),
        *BIASED,
    )
}

# family -> why it is not read
REFUSED = {
    "dbrx": "its block chooses the experts after the router, where no policy reaches",
    "diffusion_gemma": "it denoises blocks of text and is no causal language model",
    "doge": "its experts are rows of an embedding, found by product keys",
    "dots3_note": "its vision encoder has experts, too; its decoder, dots3_note_text, is read",
    "ernie4_5_vl_moe": "each of its layers has other experts for text than for images",
    "inkling_mm_model": "its router weighs the shared experts together with the chosen ones",
    "inkling_text": "its router weighs the shared experts together with the chosen ones",
    "jetmoe": "its attention has experts, too, and its routers give no list of the chosen ones",
    "longcat_flash": "its router also chooses among experts that do nothing",
    "nllb-moe": "an encoder-decoder whose router gives no list of the chosen experts",
    "openai_privacy_filter": "it tags tokens and is no language model",
    "qwen3_omni_moe": "it is two decoders with experts; one, qwen3_omni_moe_thinker, is read",
    "zaya": "each layer's router goes on from that of the layer before",
}
