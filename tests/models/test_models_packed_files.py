"""Packed folders: what save_model writes, what others write, and what is in them."""

import json
import shutil
from collections import Counter
from itertools import product

import pytest
import torch
from packed_models import (
    llama,
    logits_of,
    model_of,
    packed_folder_of,
    parts,
    saved,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import expertly
from expertly.errors import ExpertlyError
from expertly.kernels.packed import dequantize
from expertly.kernels.packed_linear import PackedLinear
from expertly.kernels.quantize import quantize
from expertly.models.inspect import inspect_folder
from expertly.models.loading import load_weights
from expertly.models.packed_loading import choose_device
from expertly.models.packing import experts_modules, is_packed

STOCK = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "nemotron_h", "llama")


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    """packed_folder(family, bits) -> a folder that save_model made of a packed model."""
    made = {}

    def make(family="qwen3_moe", bits=4):
        if (family, bits) not in made:
            made[family, bits] = packed_folder_of(family, bits, tmp_path_factory.mktemp(family))
        return made[family, bits]

    return make


PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def format_of():
    """The format as its own package implements it."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry("pack-quantized")


def scheme_of(bits):
    """Weights with zero points in groups of 32, in the words of the package."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = {"num_bits": bits, "type": "int", "symmetric": False}
    args = QuantizationArgs(**args, strategy="group", group_size=32)
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("family, bits", [*product(STOCK, (4, 8))])
def test_stock_transformers_loads_the_same_logits(packed_folder, tiny_ids, family, bits):
    pytest.importorskip("compressed_tensors")
    folder = packed_folder(family, bits)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = expertly.open_model(folder)
    exact = model_of(family)
    for name, weight in weights_of(ours).items():
        for end, leaf in ((".up", None), (".down", "down_proj")):
            if name.endswith(end):
                experts = exact.get_submodule(name.removesuffix(end))
                leaf = leaf or ("gate_up_proj" if experts.has_gate else "up_proj")
                getattr(experts, leaf).data = dequantize(weight)
                break
        else:
            exact.get_submodule(name).weight.data = dequantize(weight)
    assert logits_of(stock, tiny_ids).equal(logits_of(exact, tiny_ids))


@pytest.mark.parametrize("family, bits", [*product((*STOCK, "glm4_moe"), (4, 8))])
def test_what_is_saved_opens_again_bit_for_bit(tmp_path, tiny_ids, family, bits):
    dense = saved(model_of(family), tmp_path / "dense")
    model = expertly.open_model(dense, bits=bits)
    again = expertly.open_model(saved(model, tmp_path / "packed"))
    one, other = weights_of(model), weights_of(again)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.data.equal(other[name].data) and weight.scales.equal(other[name].scales)
    assert logits_of(again, tiny_ids).equal(logits_of(model, tiny_ids))
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("family", ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "llama"))
def test_at_16_bits_a_stock_folder_is_written(tmp_path, tiny_ids, family):
    dense = saved(model_of(family).bfloat16(), tmp_path / "dense")
    model = expertly.open_model(dense, bits=16)
    again = saved(model, tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, again))
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert not is_packed(load_weights(again))
    one, other = (json.loads((f / "config.json").read_text()) for f in (dense, again))
    assert one == other


@pytest.mark.parametrize("bits", (4, 8, 16))
def test_a_tied_head_is_saved_beside_the_embedding_or_not_at_all(tmp_path, tiny_ids, bits):
    dense = saved(llama(tie_word_embeddings=True), tmp_path / "dense")
    model = expertly.open_model(dense, bits=bits)
    folder = saved(model, tmp_path / "again")
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118
    assert config["tie_word_embeddings"] is (bits == 16) and bool(heads) is (bits < 16)
    again = expertly.open_model(folder, bits=bits)
    assert logits_of(again, tiny_ids).equal(logits_of(model, tiny_ids)) or bits == 16


def test_the_config_names_the_scheme_of_the_head_and_what_is_left_alone(packed_folder):
    said = json.loads((packed_folder("mixtral") / "config.json").read_text())
    said = said["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"
    usual, head = said["config_groups"].values()
    assert usual["targets"] == ["Linear"] and usual["weights"]["num_bits"] == 4
    assert head["targets"] == ["lm_head"] and head["weights"]["num_bits"] == 8
    for group in (usual, head):
        weights = group["weights"]
        assert weights["strategy"] == "group" and weights["group_size"] == 32
        assert weights["symmetric"] and weights["type"] == "int" and not weights["dynamic"]
    # by the names of the files, which is how vLLM knows a router
    assert "model.layers.0.block_sparse_moe.gate" in said["ignore"]
    assert not any("proj" in name or "embed" in name for name in said["ignore"])


def test_files_hold_the_formats_tensors_under_the_familys_names(packed_folder):
    tensors = load_file(packed_folder("mixtral") / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight_"
    assert tensors[f"{name}packed"].shape == (64, 96 // 8)
    assert tensors[f"{name}packed"].dtype == torch.int32
    assert tensors[f"{name}scale"].shape == (64, 96 // 32)
    assert tensors[f"{name}shape"].tolist() == [64, 96]
    assert not any(part.endswith("zero_point") for part in tensors)


def test_scales_take_two_bytes_where_the_model_is_in_half_precision(tmp_path, tiny_ids):
    dense = saved(model_of("olmoe").bfloat16(), tmp_path / "dense")
    model = expertly.open_model(dense, bits=4)
    folder = saved(model, tmp_path / "packed")
    scales = [t for n, t in load_file(folder / "model.safetensors").items() if "scale" in n]
    assert {scale.dtype for scale in scales} == {torch.float16}
    again = expertly.open_model(folder)
    assert again.dtype == torch.bfloat16
    assert logits_of(again, tiny_ids).equal(logits_of(model, tiny_ids))


def test_a_large_model_is_saved_in_shards(tmp_path, tiny_ids, monkeypatch):
    monkeypatch.setattr("expertly.models.packed_writer._SHARD", 50_000)
    model = expertly.open_model(saved(model_of("qwen3_moe"), tmp_path / "dense"), bits=8)
    folder = saved(model, tmp_path / "packed")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_parameters"] == model_of("qwen3_moe").num_parameters()
    assert logits_of(expertly.open_model(folder), tiny_ids).equal(logits_of(model, tiny_ids))


@pytest.mark.parametrize("bits", (4, 8))
def test_zero_points_are_saved_and_opened_and_mean_the_same_to_the_format(tmp_path, tiny_ids, bits):
    pytest.importorskip("compressed_tensors")
    dense = saved(llama(), tmp_path / "dense")
    model = expertly.open_model(dense, bits=bits)
    plain = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            weight = quantize(plain.get_submodule(name).weight, bits, symmetric=False)
            model.set_submodule(name, PackedLinear(weight))
            plain.get_submodule(name).weight.data = dequantize(weight)
    folder = saved(model, tmp_path / "packed")
    again = expertly.open_model(folder)
    for name, weight in weights_of(model).items():
        other = weights_of(again)[name]
        assert all(a.equal(b) for a, b in zip(parts(weight), parts(other), strict=True))
        assert other.zeros.dtype == torch.uint8
    assert (logits_of(again, tiny_ids) - logits_of(plain, tiny_ids)).abs().max() < 0.5
    tensors = load_file(folder / "model.safetensors")
    for name, weight in weights_of(model).items():
        state = {part: tensors[f"{name}.{part}"] for part in PARTS}
        numbers = format_of().decompress(state, scheme_of(weight.bits))["weight"]
        assert numbers.equal(dequantize(weight))


def test_a_folder_that_another_tool_wrote_opens_packed(tmp_path):
    """Experts alone, with zero points: as the format's own package writes them."""
    pytest.importorskip("compressed_tensors")
    scheme, compressor = scheme_of(4), format_of()
    folder = saved(model_of("qwen3_moe"), tmp_path / "model")
    tensors, numbers = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        groups = weight.unflatten(-1, (-1, 32))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).bfloat16().float()
        state = {
            "weight": weight,
            "weight_scale": scale,
            "weight_zero_point": (-low / scale - 8).round().clamp(-8, 7).to(torch.int8),
        }
        state = compressor.compress(state, scheme)
        numbers[name] = compressor.decompress(state, scheme)["weight"]
        tensors.update({f"{name.removesuffix('weight')}{part}": t for part, t in state.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = expertly.open_model(folder)
    experts = experts_modules(model)["model.layers.1.mlp.experts"].packed
    down = torch.stack(
        [numbers[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
    )
    assert dequantize(experts.down).equal(down)
    assert type(model.lm_head) is torch.nn.Linear and len(weights_of(model)) == 6


def test_bits_and_groups_beside_a_packed_folder_must_be_its_own(packed_folder):
    for options in ({"bits": 4}, {"group_size": 32}, {"bits": 4, "group_size": 32}):
        assert is_packed(expertly.open_model(packed_folder(), **options))
    for options in ({"bits": 8}, {"group_size": 64}, {"bits": 4, "group_size": 64}):
        with pytest.raises(ExpertlyError) as error:
            expertly.open_model(packed_folder(), **options)
        assert error.value.code == "E202" and "compressed-tensors" in str(error.value)
        assert "4 bits in groups of 32" in str(error.value)
    with pytest.raises(ExpertlyError) as error:
        expertly.open_model(packed_folder(), experts_implementation="eager")
    assert error.value.code == "E202"


def test_the_heads_group_may_come_first_in_config(packed_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["config_groups"] = dict(reversed(groups.items()))
    (folder / "config.json").write_text(json.dumps(config))
    assert is_packed(expertly.open_model(folder, bits=4))
    with pytest.raises(ExpertlyError, match="E202"):
        expertly.open_model(folder, bits=8)


def test_a_packed_folder_runs_on_the_cpu_where_there_is_a_gpu(packed_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dense = packed_folder().parent / "dense"
    assert choose_device(packed_folder()) == choose_device(dense, bits=4) == "cpu"
    assert choose_device(dense) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(dense) == "cpu"


def test_inspect_counts_weights_not_words(packed_folder, cli):
    folder = packed_folder("mixtral")
    found, dense = inspect_folder(folder), inspect_folder(folder.parent / "dense")
    assert found.parameters == dense.parameters and found.total == dense.total
    assert found.active == dense.active and found.layout == "per expert"
    assert found.format.startswith("4 bits in groups of 32: ") and "8 bits" in found.format
    assert "experts" in found.format and dense.format == "dense"
    assert set(found.dtypes) == {"int4", "int8", "F32"}
    sizes = Counter()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            sizes[".experts." in name] += file.get_tensor(name).nbytes
    assert found.bytes["experts"] == sizes[True]
    assert sum(found.bytes.values()) == sizes.total()
    code, out, _ = cli("inspect", folder)
    assert code == 0 and "4 bits in groups of 32" in out
