"""Saving packed models: over other models, when it fails, and what is refused instead."""

import copy
import json
import pickle

import pytest
import torch
from packed_models import contents, llama, logits_of, model_of, saved
from safetensors.torch import load_file
from tiny_families import tiny_family

import expertly
from expertly.errors import ExpertlyError
from expertly.kernels.packed_linear import PackedLinear
from expertly.kernels.quantize import quantize
from expertly.models.packed_writer import Writer
from expertly.models.packing import is_packed


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved(model_of("qwen3_moe"), tmp_path_factory.mktemp("qwen") / "dense")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("expertly.models.packed_writer._SHARD", 50_000)


@pytest.mark.parametrize("bits", (4, 16))
def test_it_takes_the_place_of_the_model_that_it_was_opened_from(tmp_path, tiny_ids, bits):
    folder = saved(model_of("qwen3_moe"), tmp_path / "model")
    model = expertly.open_model(folder, bits=bits)
    again = expertly.open_model(saved(model, folder), bits=bits)
    assert logits_of(again, tiny_ids).equal(logits_of(model, tiny_ids))
    assert is_packed(expertly.open_model(folder)) is (bits < 16)
    assert {path.name for path in folder.iterdir()} == set(contents(saved(model, tmp_path / "new")))


def test_shards_take_the_place_of_one_file_and_one_file_that_of_shards(
    dense, tmp_path, tiny_ids, monkeypatch
):
    one, other = expertly.open_model(dense, bits=4), expertly.open_model(dense, bits=8)
    folder = saved(one, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("expertly.models.packed_writer._SHARD", 50_000)
        saved(other, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert logits_of(expertly.open_model(folder), tiny_ids).equal(logits_of(other, tiny_ids))
    with monkeypatch.context() as patch:
        patch.setattr("expertly.models.packed_writer._SHARD", 100_000)
        saved(one, folder)  # fewer shards, of other names
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in folder.glob("*.safetensors")}
    saved(one, folder)
    assert logits_of(expertly.open_model(folder), tiny_ids).equal(logits_of(one, tiny_ids))
    assert {file.name for file in folder.glob("model*")} == {"model.safetensors"}
    assert (folder / "tokenizer.json").exists()


def test_a_manifest_of_the_model_before_goes_with_it(dense, tmp_path):
    model = expertly.open_model(dense, bits=4)
    folder = saved(model, tmp_path / "model")
    (folder / "MANIFEST.json").write_text('{"files": {"config.json": {"size": 1, "sha256": ""}}}')
    saved(model, folder)
    expertly.open_model(folder)


@pytest.mark.parametrize("family", ("gpt_oss", "granitemoe"))
def test_families_whose_files_have_experts_in_one_tensor_are_refused(tmp_path, family):
    changes = {"num_key_value_heads": 2, "intermediate_size": 32, "hidden_size": 64}
    changes |= {"head_dim": 16} if family == "gpt_oss" else {}
    dense = saved(tiny_family(family, **changes), tmp_path / "dense")
    model = expertly.open_model(dense, bits=4)
    with pytest.raises(ExpertlyError) as error:
        saved(model, tmp_path / "packed")
    assert error.value.code == "E306" and "one tensor" in str(error.value)
    assert not (tmp_path / "packed").exists()
    before = contents(dense)
    with pytest.raises(ExpertlyError):
        saved(model, dense)
    assert contents(dense) == before


def test_float_minima_cannot_be_saved(tmp_path):
    model = expertly.open_model(saved(llama(), tmp_path / "dense"), bits=4)
    weight = llama().model.layers[0].self_attn.q_proj.weight
    packed = quantize(weight, 4, symmetric=False, minimum=True)
    model.set_submodule("model.layers.0.self_attn.q_proj", PackedLinear(packed))
    with pytest.raises(ExpertlyError) as error:
        saved(model, tmp_path / "packed")
    assert error.value.code == "E306" and "q_proj" in str(error.value)
    assert "minima" in str(error.value) and not (tmp_path / "packed").exists()


@pytest.mark.parametrize("step", ("add", "finish"))
def test_a_save_that_fails_leaves_what_was_there(dense, tmp_path, step, monkeypatch, small_shards):
    folder = saved(model_of("olmoe"), tmp_path / "model")
    before, calls = contents(folder), []
    whole = getattr(Writer, step)

    def fail(self, *args):
        calls.append(args)
        whole(self, *args)
        if step == "finish" or len(calls) == 10:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, step, fail)
    with pytest.raises(OSError, match="No space"):
        saved(expertly.open_model(dense, bits=4), folder)
    assert contents(folder) == before
    expertly.open_model(folder)


def test_save_pretrained_of_a_packed_model_is_one_line(dense, tmp_path):
    model = expertly.open_model(dense, bits=4)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ExpertlyError, match=r"E202.*expertly\.save_model") as error:
            each.save_pretrained(tmp_path / "model")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
    assert "save_pretrained" not in vars(expertly.open_model(dense))


@pytest.mark.parametrize("bits", (4, 16))
def test_a_head_that_was_the_embedding_is_its_own_and_says_so(tmp_path, tiny_ids, bits):
    folder = saved(llama(tie_word_embeddings=True), tmp_path / "model")
    model = expertly.open_model(folder, bits=bits)
    before = logits_of(model, tiny_ids)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert isinstance(model.lm_head, PackedLinear)
    assert logits_of(model, tiny_ids).equal(before)
    with pytest.raises(ExpertlyError, match=r"E202.*head"):
        model.resize_token_embeddings(400)
    assert logits_of(model, tiny_ids).equal(before)


def test_an_untied_head_of_16_bits_stays_so(tmp_path):
    folder = saved(llama(), tmp_path / "model")
    again = saved(expertly.open_model(folder, bits=16), tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(again / "model.safetensors")


def test_packed_weights_are_loaded_by_copy(dense, tiny_ids):
    one, other = expertly.open_model(dense, bits=4), expertly.open_model(dense, bits=4)
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name.endswith("_scales"):
                buffer.mul_(2)
    assert not logits_of(one, tiny_ids).equal(logits_of(other, tiny_ids))
    one.load_state_dict(other.state_dict())
    assert logits_of(one, tiny_ids).equal(logits_of(other, tiny_ids))
    with pytest.raises(ExpertlyError, match=r"E202.*assign=True"):
        one.load_state_dict(other.state_dict(), assign=True)
    embedding = {"model.embed_tokens.weight": torch.zeros(300, 64)}
    one.load_state_dict(embedding, assign=True, strict=False)  # what is not packed may be assigned
    assert not one.get_input_embeddings().weight.any()
