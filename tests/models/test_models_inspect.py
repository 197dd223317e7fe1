"""What inspect says of a folder, against the module that it holds."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config

from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST
from expertly.models.build import build_model, twin_config
from expertly.models.inspect import inspect_folder, part_of
from expertly.models.layers import moe_layers
from expertly.models.loading import save_model

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
each_family = pytest.mark.parametrize("family", FAMILIES)


def numbers(*modules):
    return sum(t.numel() for m in modules for t in (*m.parameters(), *m.buffers()))


@each_family
def test_totals_are_those_of_the_module(family, tiny_folder, tiny_model):
    model = tiny_model(family)
    layers = moe_layers(model)
    found = inspect_folder(tiny_folder(family))
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    experts = numbers(*(layer.experts for layer in layers))
    assert found.total == sum(found.parameters.values()) == sum(found.dtypes.values()) == total
    assert found.active == total - experts * 6 // 8
    assert found.parameters["experts"] == experts
    assert found.parameters["router"] == numbers(*(layer.router for layer in layers))
    assert found.bytes == {part: 4 * count for part, count in found.parameters.items()}
    assert found.dtypes == {"F32": total}
    assert (found.family, found.layout) == (family, "per expert")
    assert (found.layers, found.moe_layers) == (model.config.num_hidden_layers, len(layers))
    assert (found.experts, found.top_k) == (8, 2)
    assert found.verified
    if family == "deepseek_v3":
        shared = [model.get_submodule(f"{layer.name}.shared_experts") for layer in layers]
        assert found.parameters["shared experts"] == numbers(*shared)
        assert found.parameters["dense layers"] == numbers(model.model.layers[0].mlp)


@each_family
def test_fused_experts_are_counted_alike(family, tiny_model, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    found = inspect_folder(tmp_path)
    assert found.layout == "fused"
    assert found.moe_layers == len(moe_layers(model))
    assert found.total == sum(tensor.numel() for tensor in model.state_dict().values())
    assert not found.verified


@each_family
def test_a_twin_has_no_experts(family, tiny_model, tmp_path):
    twin = build_model(twin_config(tiny_model(family).config))
    save_model(twin, tmp_path)
    found = inspect_folder(tmp_path)
    assert (found.experts, found.top_k, found.moe_layers, found.layout) == (0, 0, 0, "none")
    assert found.active == found.total == sum(p.numel() for p in twin.parameters())


def test_shards_are_added_up(tiny_folder, tiny_model, tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    whole = inspect_folder(tiny_folder("qwen3_moe"))
    found = inspect_folder(tmp_path)
    assert (found.total, found.parameters) == (whole.total, whole.parameters)
    shutil.copy(shards[0], tmp_path / "consolidated.safetensors")
    assert inspect_folder(tmp_path).total == whole.total
    shards[1].unlink()
    with pytest.raises(ExpertlyError, match="is missing") as error:
        inspect_folder(tmp_path)
    assert error.value.code == "E301"


def test_hashes_find_what_sizes_cannot(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("mixtral"), tmp_path / "copy")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert inspect_folder(folder).verified
    with pytest.raises(ExpertlyError, match="sha256 mismatch") as error:
        inspect_folder(folder, hashes=True)
    assert error.value.code == "E302"
    (folder / MANIFEST).unlink()
    assert not inspect_folder(folder, hashes=True).verified


def test_a_model_that_is_in_no_table_is_counted_too(tmp_path):
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    found = inspect_folder(tmp_path)
    assert (found.family, found.experts) == ("gpt2", 0)
    assert found.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["longcat_flash", "jetmoe", "nllb-moe", "nobody_knows"])
def test_an_moe_of_no_family_that_is_read_is_refused(family, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("mixtral"), tmp_path / "copy")
    (folder / MANIFEST).unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ExpertlyError, match=f"model_type '{family}'") as error:
        inspect_folder(folder)
    assert error.value.code == "E306"


def test_a_family_that_is_refused_is_so_without_experts_by_our_names_too(tmp_path):
    save_file({"encoder.layers.0.ffn.wi": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "nllb-moe"}')
    with pytest.raises(ExpertlyError, match="encoder-decoder") as error:
        inspect_folder(tmp_path)
    assert error.value.code == "E306"


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": None}, {"num_local_experts": 0}])
def test_sizes_that_cannot_be_are_refused(changes, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("mixtral"), tmp_path / "copy")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ExpertlyError, match="expected a whole number") as error:
        inspect_folder(folder)
    assert error.value.code == "E305"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.shared_experts.gate_proj.weight", "shared experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "experts"),
        ("model.layers.0.block_sparse_moe.down_proj.weight", "dense layers"),
        ("model.layers.0.shared_mlp.input_linear.weight", "shared experts"),
        ("model.layers.0.mlp.experts.e_score_correction_bias", "router"),
        ("model.layers.0.mlp.expert_bias", "router"),
        ("model.layers.0.moe.router_bias", "router"),
        ("model.layers.0.moe.down_proj.weight", "experts"),
        ("model.layers.0.share_expert.down_proj.weight", "shared experts"),
        ("model.layers.0.mlp.gate_proj.weight", "dense layers"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("something.else", "other"),
    ],
)
def test_names_say_the_part(name, part):
    assert part_of(name) == part


def test_it_needs_no_torch(tiny_folder):
    code = (
        "import sys; from pathlib import Path; from expertly.models.inspect import inspect_folder;"
        f"inspect_folder(Path({str(tiny_folder('mixtral'))!r}));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
