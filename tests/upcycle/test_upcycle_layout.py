"""What is written where: the names, shapes and dtypes of the stock class, and nothing rounded."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expertly.errors import ExpertlyError
from expertly.models.build import build_model
from expertly.models.inspect import inspect_folder
from expertly.models.loading import open_model
from expertly.upcycle.layout import Made, parts, values

CASES = [
    pytest.param("llama", {}, {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, {"slices": 2}, id="tied-slices"),
    pytest.param("llama", {}, {"shared": True, "every": 2, "slices": 3}, id="shared-every"),
    pytest.param("qwen2", {"tie_word_embeddings": True}, {}, id="qwen2-tied"),
    pytest.param("qwen3", {"attention_bias": True}, {"every": 2}, id="qwen3-bias-every"),
    pytest.param("gemma", {"head_dim": 8}, {"num_experts": 3}, id="gemma"),
    pytest.param("olmo2", {}, {"slices": 2}, id="olmo2"),
]


@pytest.mark.parametrize(("family", "keys", "config"), CASES)
def test_names_and_shapes_are_those_that_transformers_writes_and_values_fill_them(
    family, keys, config, prepared, tmp_path
):
    job = prepared(family, keys=keys, **config)
    build_model(job.shape).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        wanted = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    made = parts(job)
    assert {part.entry.name: part.entry.shape for part in made} == wanted
    assert len(made) == len(wanted), "each once"
    rows = {layer: torch.zeros(job.copies, 32) for layer in job.moe_layers}
    for part, blocks in zip(made, values(job, made, rows), strict=True):
        numbers = torch.cat([block.flatten() for block in blocks])
        assert numbers.numel() * numbers.itemsize == part.entry.nbytes
        assert numbers.dtype == part.entry.dtype


def halved(dense_folder, to, pick=lambda name: True, dtype=torch.bfloat16, **keys):
    """A copy of a Llama whose picked tensors have another dtype."""
    folder = shutil.copytree(dense_folder("llama", **keys), to)
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: each.to(dtype) if pick(name) else each for name, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def test_half_precision_stays_and_is_exact(dense_folder, upcycle, tmp_path):
    dense = halved(dense_folder, tmp_path / "dense")
    made = upcycle(dense, slices=4, top_k=4, num_experts=8)
    assert inspect_folder(made.folder).dtypes == {"BF16": made.parameters}
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"
    old, new = (load_file(folder / "model.safetensors") for folder in (dense, made.folder))
    for name, tensor in old.items():
        if ".mlp." not in name:
            assert torch.equal(new[name], tensor), name
    down = torch.cat(
        [new[f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight"] for i in range(4)], dim=1
    )
    assert torch.equal(down, old["model.layers.0.mlp.down_proj.weight"] * 4)
    assert made.exact and made.largest_logit_difference < 1e-4


def test_every_tensor_keeps_its_own_dtype(dense_folder, upcycle, tmp_path):
    dense = halved(dense_folder, tmp_path / "dense", lambda name: "mlp" in name)
    made = upcycle(dense, num_experts=4)
    tensors = load_file(made.folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert (tensor.dtype == torch.bfloat16) == ("block_sparse_moe" in name), name
    assert made.exact


def test_slices_that_half_precision_would_round_are_refused(dense_folder, upcycle, tmp_path):
    dense = halved(dense_folder, tmp_path / "dense")
    with pytest.raises(ExpertlyError, match=r"E202.* slices: 3, and bfloat16 .*power of 2"):
        upcycle(dense, slices=3)


def test_gemma_is_written_out_in_full_in_float32(dense_folder, upcycled):
    made = upcycled("gemma", num_experts=2)
    old, new = (
        load_file(folder / "model.safetensors") for folder in (dense_folder("gemma"), made.folder)
    )
    assert set(inspect_folder(made.folder).dtypes) == {"F32"}
    for name in ("model.norm.weight", "model.layers.1.post_attention_layernorm.weight"):
        assert torch.equal(new[name], old[name] + 1)
    words = old["model.embed_tokens.weight"]
    torch.testing.assert_close(new["model.embed_tokens.weight"], words * 32**0.5)
    assert torch.equal(new["lm_head.weight"], words), "the head is what embeddings were"


def test_a_file_without_the_expected_range_is_an_error_and_no_model(
    dense_folder, upcycle, tmp_path
):
    """4 x 30,000 is too large for half precision."""
    dense = halved(dense_folder, tmp_path / "dense", dtype=torch.float16)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 3e4
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExpertlyError) as error:
        upcycle(dense, slices=4)
    assert str(error.value) == (
        f"error[E301] {dense}: model.layers.1.mlp.down_proj.weight holds what float16 cannot say. "
        "FIX: choose float32 or fewer slices"
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dense"]


# --- Read back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {"drop": 0.5, "slices": 2}), ("qwen3", {"every": 2, "drop": 0.5})],
)
def test_what_is_read_back_is_what_transformers_opens(family, config, prepared, upcycled):
    job, result = prepared(family, **config), upcycled(family, **config)
    made = Made(result.folder, job.target, job.num_experts)
    for name, tensor in open_model(result.folder).state_dict().items():
        assert torch.equal(made.tensor(name), tensor), name
