"""Models that can be packed, and what is in them, for the tests of packing."""

import torch
from tiny_families import tiny_family
from transformers import AutoConfig

import expertly
from expertly.kernels.packed import unpack
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.build import build_model
from expertly.models.loading import save_model
from expertly.models.packing import experts_modules

WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
LLAMA = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# in nemotron_h every width must be one that groups divide
WIDER = {"intermediate_size": 64, "mamba_head_dim": 8, "moe_shared_expert_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}
CHANGES = {"nemotron_h": WIDER, "deepseek_v3": LATENT}


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


def llama(**changes):
    torch.manual_seed(0)
    return build_model(AutoConfig.for_model("llama", **{**LLAMA, **changes})).eval()


def saved(model, folder):
    save_model(model, folder)
    return folder


def contents(folder):
    """Every file of a folder by name, and its bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights_of(model):
    """Every packed weight by name."""
    found = {n: m.weight for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    for name, experts in experts_modules(model).items():
        found[f"{name}.up"], found[f"{name}.down"] = experts.packed.gate_up, experts.packed.down
    return found


def parts(weight):
    return [part for part in unpack(weight) if part is not None]


def model_of(family, **changes):
    if family == "llama":
        return llama(**changes)
    return tiny_family(family, **{**WIDE, **CHANGES.get(family, {}), **changes})


def packed_folder_of(family, bits, root):
    """A folder that save_model made of a packed model."""
    dense = saved(model_of(family), root / "dense")
    return saved(expertly.open_model(dense, bits=bits), root / "packed")
