"""Adapters' folders: written for stock PEFT, read from it, and refused in one line."""

import json
import shutil

import pytest
import torch
from adapted import adapted, folder_of, saved_adapter, stock
from packed_models import logits_of, model_of, saved
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close as close
from transformers import AutoModelForCausalLM

import expertly
from expertly.errors import ExpertlyError
from expertly.models.adapter_files import (
    CONFIG,
    WEIGHTS,
    base_of,
    is_adapter_folder,
    load_adapter,
    tokenizer_folder,
)
from expertly.models.attach import attach
from expertly.models.layers import moe_layers
from expertly.models.loading import load_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folder_of("qwen3_moe", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """An adapter's folder, and the logits of the model that it was made on."""
    model = adapted(base)
    ids = torch.arange(24).reshape(2, 12)
    return saved_adapter(model, base, tmp_path_factory.mktemp("made")), ids, logits_of(model, ids)


@pytest.fixture
def own_copy(made, tmp_path):
    """own_copy(tensors=.., **config) -> the adapter's folder with changes."""

    def make(tensors=None, **config):
        folder = shutil.copytree(made[0], tmp_path / "copy")
        said = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**said, **config}))
        if tensors is not None:
            kept = load_file(folder / WEIGHTS)
            tensors(kept)
            save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


def refused(code, said, folder):
    with pytest.raises(ExpertlyError) as error:
        expertly.open_model(folder)
    assert error.value.code == code and said in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_an_adapters_folder_opens_as_its_base_with_it(made):
    folder, ids, logits = made
    model = expertly.open_model(folder)
    close(logits_of(model, ids), logits)
    assert not model.training and is_adapter_folder(folder)


def test_its_base_is_packed_while_it_opens(made):
    folder, ids, logits = made
    model = expertly.open_model(folder, bits=8)
    assert all(hasattr(layer.experts, "packed") for layer in moe_layers(model))
    share = (logits_of(model, ids) - logits).norm() / logits.norm()
    assert share < 0.05


def test_what_is_written(made, base):
    """PEFT's two files with PEFT's names, and what tells the base from another."""
    folder, *_ = made
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        CONFIG,
        WEIGHTS,
        "expertly/base.json",
    ]
    said = json.loads((folder / CONFIG).read_text())
    assert said["base_model_name_or_path"] == str(base) and said["modules_to_save"] is None
    assert said["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert said["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    names = load_file(folder / WEIGHTS).keys()
    first = "base_model.model.model.layers.0."
    assert f"{first}self_attn.q_proj.lora_A.weight" in names
    assert f"{first}mlp.experts.base_layer.lora_B.weight" in names


def test_one_that_stock_peft_saved(base, made, tmp_path):
    _, ids, _ = made
    dense = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    theirs = get_peft_model(dense, config)
    theirs.save_pretrained(tmp_path)
    close(logits_of(expertly.open_model(tmp_path), ids), logits_of(theirs, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_routers_that_learnt_by_themselves(family, tmp_path, made):
    """They are saved whole; PEFT and we read them again."""
    _, ids, _ = made
    base = folder_of(family, tmp_path)
    ours = adapted(base)
    for layer in moe_layers(ours):
        layer.router.weight.data.mul_(-1)
    folder = saved_adapter(ours, base, tmp_path, trained_routers=True)
    for model in (expertly.open_model(folder), stock(folder, base, ours)):
        close(logits_of(model, ids), logits_of(ours, ids), rtol=1e-4, atol=1e-4)


def test_a_policy_on_a_model_with_an_adapter(made):
    folder, ids, logits = made
    model = expertly.open_model(folder)
    with attach(model) as look:
        close(logits_of(model, ids), logits)
        assert len(look.decisions) == 3


def test_relative_bases(base, own_copy, tmp_path, monkeypatch):
    """From here, or else from the adapter."""
    folder = own_copy(base_model_name_or_path=base.name)
    monkeypatch.chdir(base.parent)
    assert base_of(folder).resolve() == base
    monkeypatch.chdir(tmp_path)
    (folder / base.name).symlink_to(base)
    assert base_of(folder).resolve() == base
    assert base_of(base) == base


def test_the_tokenizers_folder(base, own_copy):
    folder = own_copy()
    assert tokenizer_folder(folder) == base
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_folder(folder) == folder


def test_a_base_that_is_not_there(own_copy):
    refused("E305", "its base 'gone' is not here. FIX:", own_copy(base_model_name_or_path="gone"))


def test_a_base_whose_weights_are_others(own_copy, tmp_path):
    other = saved(model_of("qwen3_moe", initializer_range=0.04), tmp_path / "other")
    said = "its base had other weights"
    refused("E305", said, own_copy(base_model_name_or_path=str(other)))


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_an_adapter_of_another_model(family, own_copy, tmp_path):
    sizes = {"hidden_size": 32} if family == "qwen3_moe" else {}
    other = saved(model_of(family, **sizes), tmp_path / "other")
    folder = own_copy(base_model_name_or_path=str(other))
    shutil.rmtree(folder / "expertly")
    refused("E305", "is no adapter of", folder)


def test_tensors_that_do_not_fit(own_copy, base):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def drop(tensors):
        del tensors[name]

    refused("E305", "q_proj.lora_A.weight is missing", own_copy(drop))


@pytest.mark.parametrize(
    ("code", "said", "value"),
    [("E305", "is (3, 4), expected (4, 64)", torch.ones(3, 4)), ("E301", "NaN", torch.nan)],
)
def test_tensors_of_wrong_numbers(code, said, value, own_copy):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def change(tensors):
        tensors[name] = value * torch.ones(4, 64) if isinstance(value, float) else value

    refused(code, said, own_copy(change))


def test_a_tensor_that_has_no_place(own_copy):
    def add(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.ones(2)

    refused("E305", "lm_head.weight is unknown", own_copy(add))


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"lora_bias": True}],
)
def test_kinds_that_are_not_read(config, own_copy):
    refused("E306", f"{next(iter(config))}={next(iter(config.values()))!r}", own_copy(**config))


@pytest.mark.parametrize(
    "config",
    [{"r": "many"}, {"r": -1}, {"target_modules": ["nothing"], "target_parameters": []}],
)
def test_configs_that_peft_refuses(config, own_copy):
    refused("E305", "is no adapter of", own_copy(**config))


def test_damaged_files(own_copy, made):
    folder = own_copy()
    (folder / WEIGHTS).write_bytes(made[0].joinpath(WEIGHTS).read_bytes()[:200])
    refused("E301", "cannot be read", folder)
    (folder / WEIGHTS).unlink()
    refused("E301", "is missing", folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    refused("E310", "is a pickle", folder)
    (folder / CONFIG).write_text("[1]")
    refused("E301", "is not a JSON object", folder)
    (folder / CONFIG).write_text("{")
    refused("E301", CONFIG, folder)


def test_nothing_of_an_adapter_that_does_not_fit_is_filled_in(own_copy, base):
    """Shapes are looked at before the first tensor is copied."""
    folder = own_copy(lambda tensors: tensors.popitem())
    model, ids = load_weights(base), torch.ones(1, 4).long()
    before = logits_of(model, ids)
    with pytest.raises(ExpertlyError):
        load_adapter(model, folder, base=base)
    close(logits_of(model, ids), before)
