"""Packing while loading: what is packed, what it computes, and refusals in one line."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from packed_models import WIDE, llama, logits_of, saved
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family
from torch import nn
from torch.testing import assert_close as close
from transformers import AutoConfig

import expertly
from expertly.errors import ExpertlyError
from expertly.kernels.packed import dequantize, unpack
from expertly.kernels.packed_experts import PackedExperts
from expertly.kernels.packed_linear import PackedLinear
from expertly.kernels.quantize import quantize
from expertly.models.attach import attach, attached
from expertly.models.build import build_model
from expertly.models.layers import own_policy
from expertly.models.loading import open_config, save_model, skeleton
from expertly.models.packing import experts_modules, is_packed


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return saved(tiny_family("qwen3_moe", **WIDE), tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def own_copy(qwen, tmp_path):
    """own_copy(change) -> a folder whose tensors were changed by a function."""

    def make(change):
        tensors = load_file(qwen / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((qwen / "config.json").read_text())
        return tmp_path

    return make


def refused(code, folder, **options):
    with pytest.raises(ExpertlyError) as error:
        expertly.open_model(folder, **options)
    said = str(error.value)
    assert error.value.code == code and "\n" not in said, said
    return said


def rounded(folder, model):
    """The stock model of a folder with the numbers that a packed model's weights stand for."""
    plain = expertly.open_model(folder)
    plain.tie_weights = None
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weight = nn.Parameter(dequantize(module.weight))
            plain.get_submodule(name).weight = weight
    for name, experts in experts_modules(model).items():
        stock = plain.get_submodule(name)
        stock.down_proj.data = dequantize(experts.packed.down)
        stock.gate_up_proj.data = dequantize(experts.packed.gate_up)
    return plain


@pytest.mark.parametrize("bits", (4, 8))
def test_packed_are_experts_and_linears_the_head_at_8_bits_and_nothing_else(qwen, bits):
    model = expertly.open_model(qwen, bits=bits)
    held = {n: m.weight.bits for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    ends = {name.split(".")[-1] for name in held}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    assert held.pop("lm_head") == 8 and set(held.values()) == {bits}
    for experts in experts_modules(model).values():
        assert isinstance(experts.packed, PackedExperts) and experts.packed.down.bits == bits
        assert type(experts).__name__ == "Qwen3MoeExperts" and not list(experts.parameters())
    left = {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()}
    assert left == {
        "embed_tokens",
        "gate",
        "norm",
        "q_norm",
        "k_norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert not hasattr(model, "hf_quantizer") and is_packed(model)
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("group_size", (32, 64))
def test_weights_are_rounded_as_quantize_rounds_them(tmp_path, bits, group_size):
    stock = tiny_family("qwen3_moe", **{**WIDE, "moe_intermediate_size": 64})
    folder = saved(stock, tmp_path / "model")
    model = expertly.open_model(folder, bits=bits, group_size=group_size)
    for name, experts in experts_modules(model).items():
        for packed, leaf in (
            (experts.packed.gate_up, "gate_up_proj"),
            (experts.packed.down, "down_proj"),
        ):
            asked = quantize(stock.get_parameter(f"{name}.{leaf}"), bits, group_size)
            assert packed.data.equal(asked.data) and packed.scales.equal(asked.scales)


@pytest.mark.parametrize("bits", (4, 8, 16))
def test_a_packed_model_computes_what_its_rounded_weights_compute(qwen, tiny_ids, bits):
    model = expertly.open_model(qwen, bits=bits)
    ours, exact = logits_of(model, tiny_ids), logits_of(rounded(qwen, model), tiny_ids)
    # at 4 and 8 bits the native kernels also round what goes into a matrix, and a router may flip
    limit = 1e-5 if bits == 16 else 0.1
    assert (ours - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("tied", (False, True))
def test_a_dense_model_opens_packed_too(tmp_path, tiny_ids, tied):
    folder = saved(llama(tie_word_embeddings=tied), tmp_path / "llama")
    model = expertly.open_model(folder, bits=8)
    held = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    feed_forward = {"gate_proj", "up_proj", "down_proj"}
    assert held == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"} | feed_forward
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32  # stays as it is, and the head lies beside it
    if tied:
        head = unpack(model.lm_head.weight)
        assert head.q.equal(unpack(quantize(embedding, 8)).q)
    exact = logits_of(rounded(folder, model), tiny_ids)
    assert (logits_of(model, tiny_ids) - exact).norm() < 0.05 * exact.norm()


def test_a_policy_saved_with_the_model_is_attached_to_the_packed_one(tmp_path, tiny_ids):
    model = tiny_family("qwen3_moe", **WIDE)
    policy = replace(own_policy(model.config.to_dict()), top_k=3)
    with attach(model, policy) as attachment:
        save_model(model, tmp_path / "model", attachment=attachment, allow_non_stock=True)
    opened = expertly.open_model(tmp_path / "model", bits=8)
    assert opened.config.num_experts_per_tok == 3 or attached(opened).policy.top_k == 3
    assert logits_of(opened, tiny_ids).isfinite().all()


def test_it_generates_and_gradients_reach_what_is_not_packed(qwen, tiny_ids):
    model = expertly.open_model(qwen, bits=8)
    out = model.generate(tiny_ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 15)
    model(tiny_ids, labels=tiny_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_the_dtype_of_what_is_not_packed_is_the_one_that_was_asked_for(qwen, tiny_ids):
    model = expertly.open_model(qwen, bits=8, dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert logits_of(model, tiny_ids).dtype == torch.bfloat16
    # rounded from what the files hold; bfloat16 first would be another number
    wide = expertly.open_model(qwen, bits=8)
    close(logits_of(model, tiny_ids).float(), logits_of(wide, tiny_ids), atol=1.0, rtol=1.0)


def test_it_is_refused_in_one_line_when_options_do_not_fit(qwen):
    assert "bits" in refused("E202", qwen, bits=5)
    assert "group_size" in refused("E202", qwen, bits=4, group_size=16)
    for bits in (4.0, "4", True, [4]):
        assert "bits" in refused("E202", qwen, bits=bits)
    for group_size in (32.0, "32", [32]):
        assert "group_size" in refused("E202", qwen, bits=4, group_size=group_size)
    assert "bits" in refused("E202", qwen, group_size=64)
    assert "device" in refused("E202", qwen, bits=4, device="cuda")
    for device in ("foo", "cpu:x", None):
        assert "device" in refused("E202", qwen, device=device)
    assert "grouped_mm" in refused("E202", qwen, bits=4, experts_implementation="grouped_mm")


def test_a_width_that_groups_do_not_divide_is_named_with_its_tensor(tmp_path, qwen):
    folder = saved(tiny_family("qwen3_moe", hidden_size=64), tmp_path / "narrow")
    said = refused("E202", folder, bits=4)
    assert "model.layers.0.mlp.experts.down_proj" in said and "16" in said
    assert "down_proj" in refused("E202", qwen, bits=8, group_size=64)
    expertly.open_model(folder, bits=16)


def test_nan_weights_are_refused_with_the_tensors_name(own_copy):
    def spoil(tensors):
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][1, 2] = torch.nan

    said = refused("E301", own_copy(spoil), bits=4)
    assert "model.layers.1.mlp.experts.gate_up_proj" in said and "expert 3" in said

    def spoil(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"][1, 2] = torch.inf

    said = refused("E301", own_copy(spoil), bits=16)
    assert "model.layers.1.self_attn.q_proj.weight" in said and "1 of 4096" in said

    def spoil(tensors):
        tensors["model.norm.weight"][1] = torch.nan

    assert "model.norm.weight" in refused("E301", own_copy(spoil), bits=8)


def test_missing_and_misshapen_tensors_are_named(own_copy):
    missing = own_copy(lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    assert "model.layers.0.self_attn.k_proj.weight" in refused("E301", missing, bits=8)

    def narrow(tensors):
        name = "model.layers.0.self_attn.k_proj.weight"
        tensors[name] = tensors[name][:8].contiguous()

    assert "(8, 64)" in refused("E301", own_copy(narrow), bits=8)


@pytest.mark.parametrize("family", ("llama4_text", "step3p7"))
def test_experts_without_a_seam_are_refused(tmp_path, family):
    folder = saved(tiny_family(family), tmp_path / "model")
    assert family in refused("E306", folder, bits=16)


@pytest.mark.parametrize("family", ("dbrx", "jetmoe", "switch_transformers", "nllb-moe"))
def test_families_that_are_not_read_are_refused(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    assert family in refused("E306", tmp_path, bits=4)


def test_a_folder_that_is_quantised_otherwise_is_refused(qwen, tmp_path):
    config = open_config(qwen)
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    assert "fp8" in refused("E202", tmp_path, bits=4)


def test_the_skeleton_needs_no_memory_and_no_weights_are_made_for_it(qwen):
    assert next(skeleton(qwen, open_config(qwen)).parameters()).is_meta


MEMORY = """
import os, sys, torch
from pathlib import Path
from expertly.models.loading import open_model, save_model

def figure(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def opened(folder, bits, to=None):
    before = figure("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = open_model(folder, bits=bits)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(size, figure("VmHWM") - before, flush=True)
    if to is not None:
        save_model(model, Path(to))

# each in a process of its own, but the imports, which take longest, once
for step in ((sys.argv[1], 4, sys.argv[2]), (sys.argv[2], None)):
    child = os.fork()
    if not child:
        opened(*step)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_never_holds_the_model_in_high_precision(tmp_path):
    """150 MB of bfloat16 weights in 10 layers; benchmarks/open_memory.py does it at full size."""
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_experts": 16, "vocab_size": 512}
    config = AutoConfig.for_model(
        "olmoe", **sizes, num_hidden_layers=10, num_attention_heads=8, dtype=torch.bfloat16
    )
    model = build_model(config).bfloat16()
    folder = saved(model, tmp_path / "dense")
    dense = sum(parameter.nbytes for parameter in model.parameters())
    del model

    command = [sys.executable, "-c", MEMORY, folder, tmp_path / "packed"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (size, peak), (again, least) = (map(int, line.split()) for line in out.splitlines())
    assert 0.25 * dense < size < 0.34 * dense  # 4.5 of 16 bits, and the embedding
    assert peak < 1.15 * size + 60 * 2**20 < dense
    assert again == size and least < 1.15 * size + 60 * 2**20
