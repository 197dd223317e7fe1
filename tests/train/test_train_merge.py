"""Merging: a stock folder that answers as base and adapter did, or nothing at all."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close as close
from transformers import AutoModelForCausalLM

import expertly
from expertly.errors import ExpertlyError
from expertly.folders import save_folder
from expertly.models.adapter_files import CONFIG, WEIGHTS, save_adapter
from expertly.models.adapters import AdapterSpec, add_adapter
from expertly.models.loading import load_weights, save_model
from expertly.models.tokenizer import open_tokenizer
from expertly.receipts import read
from expertly.train import merge
from expertly.train.merge import MergeConfig, run


@pytest.fixture(scope="module")
def adapter_of(tiny_folder, tmp_path_factory):
    """adapter_of(family, base=None) -> an adapter on a tiny model; leave it as it is."""
    made = {}

    def make(family, base=None):
        if (family, base) not in made:
            folder = base or tiny_folder(family)
            model = load_weights(folder)
            add_adapter(model, AdapterSpec(r=4, lora_alpha=8.0))
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            target = tmp_path_factory.mktemp("adapters") / family
            made[family, base] = save_folder(
                target, lambda into: save_adapter(model, into, base=folder)
            )
        return made[family, base]

    return make


def merged(adapter, output, **options):
    lines = []
    return run(MergeConfig(adapter=str(adapter), output_dir=str(output), **options), lines.append)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_merged_model_is_a_stock_folder(family, adapter_of, tiny_ids, tmp_path):
    beside = expertly.open_model(adapter_of(family))
    made = merged(adapter_of(family), tmp_path / "out")
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(made.folder)
        close(stock(tiny_ids).logits, beside(tiny_ids).logits, rtol=1e-4, atol=1e-4)
    assert made.largest_logit_difference < 1e-4 and made.written_logit_difference < 1e-4
    assert made.adapters["experts"] == 2 * 2 and made.adapters["router"] == 0
    assert made.rounding_logit_difference == 0  # the base is in float32
    assert open_tokenizer(made.folder).eos_token_id == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_names_that_other_engines_read(adapter_of, tiny_folder, tmp_path):
    """An expert's matrix each, as the base has them."""
    made = merged(adapter_of("mixtral"), tmp_path / "out")
    names = load_file(made.folder / "model.safetensors").keys()
    assert names == load_file(tiny_folder("mixtral") / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names


def test_the_receipt(adapter_of, tiny_folder, tmp_path):
    made = merged(adapter_of("mixtral"), tmp_path / "out")
    receipt = read(made.folder)
    assert receipt.job == "merge" and all(check.passed for check in receipt.checks)
    assert [check.name for check in receipt.checks] == [
        "largest logit difference, folded in",
        "largest logit difference, written",
    ]
    assert receipt.changed["experts"] == "4 weights" and receipt.changed["router"] == "0 weights"
    assert receipt.inputs["base"]["path"] == str(tiny_folder("mixtral"))
    assert receipt.figures["tokens"] >= 512


def test_the_dtype_of_the_base_is_kept(adapter_of, tiny_folder, tiny_tokenizer, tmp_path):
    model = load_weights(tiny_folder("mixtral"), dtype=torch.bfloat16)
    base = save_folder(
        tmp_path / "half", lambda into: save_model(model, into, tokenizer=tiny_tokenizer)
    )
    made = merged(adapter_of("mixtral", base), tmp_path / "out")
    tensors = load_file(made.folder / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert made.written_logit_difference < 1e-4 < made.rounding_logit_difference


@pytest.mark.parametrize("step", ["folded in", "written"])
def test_a_mismatch_leaves_nothing_behind(step, adapter_of, tmp_path, monkeypatch):
    if step == "folded in":
        fold = merge.merge_adapter

        def wrong(model):
            fold(model)
            model.model.layers[0].mlp.experts.down_proj.data.mul_(1.5)

        monkeypatch.setattr(merge, "merge_adapter", wrong)
    else:
        save = merge.save_model

        def wrong(model, folder, **options):
            save(model, folder, **options)
            tensors = load_file(folder / "model.safetensors")
            save_file({n: t * 1.1 for n, t in tensors.items()}, folder / "model.safetensors")

        monkeypatch.setattr(merge, "save_model", wrong)
    said = refused("E101", adapter_of("mixtral"), tmp_path / "out")
    assert re.search(rf"{step}: the logits differ by [\d.]+, limit 0.0001; nothing was", said)
    assert not [*tmp_path.iterdir()]


def refused(code, adapter, output, **options):
    with pytest.raises(ExpertlyError) as error:
        merged(adapter, output, **options)
    assert error.value.code == code, error.value
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_in_the_way(adapter_of, tmp_path):
    (tmp_path / "mine").write_text("here")
    refused("E205", adapter_of("mixtral"), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "here"


def test_what_is_no_adapter(tiny_folder, tmp_path):
    assert "holds no adapter" in refused("E305", tiny_folder("mixtral"), tmp_path / "out")
    refused("E305", tmp_path / "nothing", tmp_path / "out")


def test_a_packed_base(adapter_of, tiny_model, tiny_tokenizer, tmp_path):
    dense = save_folder(
        tmp_path / "dense",
        lambda into: save_model(
            tiny_model("mixtral", moe_intermediate_size=32), into, tokenizer=tiny_tokenizer
        ),
    )
    packed = save_folder(
        tmp_path / "packed", lambda into: save_model(load_weights(dense, bits=8), into)
    )
    base = {"base": str(packed)}
    said = refused("E202", adapter_of("mixtral"), tmp_path / "out", **base)
    assert "add --base ORIGINAL" in said


def test_another_base(adapter_of, tiny_folder, tmp_path):
    base = {"base": str(tiny_folder("gpt_oss"))}
    said = refused("E305", adapter_of("mixtral"), tmp_path / "out", **base)
    assert "is no adapter of" in said and not (tmp_path / "out").exists()


def test_damaged_adapters(adapter_of, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    said = json.loads((adapter_of("mixtral") / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said))
    assert f"{WEIGHTS}: is missing" in refused("E301", folder, tmp_path / "out")
