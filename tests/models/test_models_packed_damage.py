"""Packed folders that are damaged, or of a variety that is not read: one line each."""

import json
import shutil

import pytest
import torch
from packed_models import packed_folder_of
from safetensors.torch import load_file, save_file

import expertly
from expertly.errors import ExpertlyError
from expertly.models.packing import experts_modules


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    return packed_folder_of("qwen3_moe", 4, tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def damaged(packed_folder, tmp_path):
    """damaged(change) -> what opening says after a function changed the tensors or config."""

    def make(change=None, configure=None):
        tensors = load_file(packed_folder / "model.safetensors")
        config = json.loads((packed_folder / "config.json").read_text())
        for function, changed in ((change, tensors), (configure, config)):
            if function:
                function(changed)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return refusal(tmp_path)

    return make


def refusal(folder):
    with pytest.raises(ExpertlyError) as error:
        expertly.open_model(folder)
    assert "\n" not in str(error.value)
    return error.value.code, str(error.value)


NAME = "model.layers.1.mlp.experts.3.up_proj."


def test_missing_parts_are_named(damaged):
    for part in ("weight_scale", "weight_shape", "weight_packed"):
        code, said = damaged(lambda tensors, part=part: tensors.pop(NAME + part))
        assert code == "E301" and part in said and NAME[:-1] in said


def test_parts_of_the_wrong_size_are_named(damaged):
    # half the groups with as many words would be a sound matrix of 8 bits, but not in this stack
    for part, expected in (("weight_scale", "E306"), ("weight_packed", "E301")):

        def cut(tensors, part=part):
            tensors[NAME + part] = tensors[NAME + part][:, :1].contiguous()

        code, said = damaged(cut)
        assert code == expected and NAME[:-1] in said

    def shorten(tensors):
        tensors[NAME + "weight_scale"] = tensors[NAME + "weight_scale"][:5].contiguous()

    code, said = damaged(shorten)
    assert code == "E301" and "do not fit" in said

    def retype(tensors):
        tensors[NAME + "weight_packed"] = tensors[NAME + "weight_packed"].to(torch.int64)

    code, said = damaged(retype)
    assert code == "E301" and "weight_packed is I64" in said


def test_a_weight_shape_that_lies_is_named(damaged):
    for lie in ([32, 128], [16, 64], [0, 0], [32, -64]):

        def change(tensors, lie=lie):
            tensors[NAME + "weight_shape"] = torch.tensor(lie)

        code, said = damaged(change)
        assert code == "E301" and "weight_shape" in said and NAME[:-1] in said


def test_a_scale_that_is_no_number_is_named(damaged):
    for value in (torch.nan, torch.inf, 1e30, 1e-12):

        def change(tensors, value=value):
            tensors[NAME + "weight_scale"][0, 0] = value

        code, said = damaged(change)
        assert code == "E301" and "scale" in said and NAME[:-1] in said


def test_zero_points_that_config_promises_must_be_there(damaged):
    def asymmetric(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False

    code, said = damaged(configure=asymmetric)
    assert code == "E301" and "weight_" in said


def test_varieties_of_the_format_that_are_not_read_are_refused(damaged):
    for key, value in (("num_bits", 3), ("strategy", "channel"), ("group_size", 48)):

        def configure(config, key=key, value=value):
            config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

        code, said = damaged(configure=configure)
        assert code == "E306" and str(value) in said

    def reorder(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight_g_idx"] = torch.arange(
            64, dtype=torch.int32
        )

    assert damaged(reorder)[0] == "E306"


def half_packed(tensors, change):
    """Change the experts' matrices whose names a function picks; back to dense, or to 8 bits."""
    for name in [n for n in tensors if ".experts." in n and n.endswith("weight_packed")]:
        module = name.removesuffix(".weight_packed")
        kind = change(module)
        if kind is None:
            continue
        out, width = tensors.pop(f"{module}.weight_shape").tolist()
        for part in ("weight_packed", "weight_scale"):
            tensors.pop(f"{module}.{part}")
        if kind == "dense":
            tensors[f"{module}.weight"] = torch.randn(out, width)
            continue
        tensors[f"{module}.weight_packed"] = torch.ones(out, width // 4, dtype=torch.int32)
        tensors[f"{module}.weight_scale"] = torch.ones(out, width // 32)
        tensors[f"{module}.weight_shape"] = torch.tensor([out, width])


@pytest.mark.parametrize(
    "leaf, kind", [("down_proj", "dense"), ("up_proj", "dense"), ("gate_proj", 8)]
)
@pytest.mark.parametrize("expert", ("", "experts.3."))
def test_experts_that_are_packed_in_part_are_refused(damaged, leaf, kind, expert):
    def change(tensors):
        picked = f"layers.1.mlp.{expert or 'experts.'}"
        half_packed(
            tensors, lambda module: kind if picked in module and module.endswith(leaf) else None
        )

    code, said = damaged(change)
    assert code == "E306" and "model.layers.1.mlp.experts" in said


def test_downs_may_have_other_bits_than_gates_and_ups_and_layers_may_be_dense(
    packed_folder, tmp_path, tiny_ids
):
    tensors = load_file(packed_folder / "model.safetensors")
    half_packed(tensors, lambda module: 8 if module.endswith("down_proj") else None)
    half_packed(tensors, lambda module: "dense" if "layers.0." in module else None)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((packed_folder / "config.json").read_text())
    model = expertly.open_model(tmp_path)
    held = [hasattr(experts, "packed") for experts in experts_modules(model).values()]
    assert held[:2] == [False, True]
    packed = model.model.layers[1].mlp.experts.packed
    assert (packed.gate_up.bits, packed.down.bits) == (4, 8)
    assert model(tiny_ids).logits.isfinite().all()


GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
MALFORMED = [
    {"config_groups": {"g": 3}},
    {"config_groups": {"g": {"weights": 4}}},
    {"config_groups": {"g": {"weights": GROUP, "format": ["pack-quantized"]}}},
    {"config_groups": {"g": {"weights": {**GROUP, "num_bits": 4.0}}}},
    {"config_groups": {"g": {"weights": {**GROUP, "num_bits": [4]}}}},
    {"config_groups": {"g": {"weights": {**GROUP, "group_size": 32.0}}}},
    {"config_groups": {"g": {"weights": {**GROUP, "symmetric": "no"}}}},
    {"config_groups": [GROUP]},
    {"format": ["pack-quantized"]},
    {"sparsity_config": {"format": "sparse-24-bitmask"}},
    {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
]


@pytest.mark.parametrize("changes", MALFORMED, ids=str)
def test_a_quantization_config_that_is_not_read_is_one_line(packed_folder, tmp_path, cli, changes):
    folder = tmp_path / "model"
    shutil.copytree(packed_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]
    if "format" in changes:
        del said["config_groups"]["group_0"]["format"]
    said.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    code, _ = refusal(folder)
    assert code in ("E301", "E306")
    for command in ("inspect", "generate"):
        status, _, err = cli(command, folder)
        assert status == 3 and f"error[{code}]" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("key", ("sparsity_config", "transform_config"))
def test_parts_of_a_quantization_config_that_say_nothing_are_fine(packed_folder, tmp_path, key):
    config = json.loads((packed_folder / "config.json").read_text())
    config["quantization_config"][key] = {"format": "dense"} if key[0] == "s" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(packed_folder / "model.safetensors", tmp_path)
    expertly.open_model(tmp_path)


def test_a_truncated_file_is_refused(packed_folder, tmp_path):
    folder = tmp_path
    data = (packed_folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_bytes((packed_folder / "config.json").read_bytes())
    for size in (4, 1000, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        assert refusal(folder)[0] == "E301"


def test_layers_of_another_shape_than_configs_are_refused(damaged):
    code, said = damaged(configure=lambda config: config.update(moe_intermediate_size=64))
    assert code == "E301" and "shape" in said
