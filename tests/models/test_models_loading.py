"""Opening and saving: exact round trips, stock files, and refusals in one line."""

import errno
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST, save_folder
from expertly.models.build import twin_config
from expertly.models.loading import load_weights, open_config, open_model, save_model

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
each_family = pytest.mark.parametrize("family", FAMILIES)
ROUTER = {"mixtral": "model.layers.1.block_sparse_moe.gate.weight"}
EXPERT = {"mixtral": "model.layers.1.block_sparse_moe.experts.5.w2.weight"}


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """copied(family) -> a folder of one's own, without a manifest."""

    def make(family="mixtral"):
        folder = shutil.copytree(tiny_folder(family), tmp_path / "copy")
        (folder / MANIFEST).unlink()
        return folder

    return make


def change(folder, change):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(folder, code):
    with pytest.raises(ExpertlyError) as error:
        open_model(folder)
    assert error.value.code == code, error.value
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Round trips -------------------------------------------------------------------------------


@each_family
def test_open_and_save_change_no_bit(family, tiny_model, tiny_folder, tiny_ids, tmp_path):
    before = tiny_model(family)
    opened = open_model(tiny_folder(family))
    assert not opened.training
    assert opened.config._experts_implementation == "expertly"
    assert logits_of(opened, tiny_ids).equal(logits_of(before, tiny_ids))
    save_model(opened, tmp_path)
    first = load_file(tiny_folder(family) / "model.safetensors")
    second = load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@each_family
def test_files_are_the_familys_own_and_stock_loads_them(family, tiny_folder, tiny_ids):
    folder = tiny_folder(family)
    names = set(load_file(folder / "model.safetensors"))
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    up = "w1" if family == "mixtral" else "gate_proj"
    assert f"model.layers.1.{block}.experts.7.{up}.weight" in names
    assert f"model.layers.1.{block}.gate.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    files = {file.name for file in folder.iterdir()}
    stock = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert stock <= files
    assert "expertly" not in files
    for experts in ("grouped_mm", "eager"):
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts)
        ours = open_model(folder, experts_implementation=experts)
        assert logits_of(ours, tiny_ids).equal(logits_of(model.eval(), tiny_ids))


@each_family
def test_bfloat16_opens_as_it_was_saved(family, tiny_model, tmp_path):
    save_model(tiny_model(family).bfloat16(), tmp_path)
    assert open_model(tmp_path).dtype == torch.bfloat16
    assert open_model(tmp_path, dtype=torch.float32).dtype == torch.float32


@each_family
def test_a_twin_opens(family, tiny_model, tiny_ids, tmp_path):
    twin = AutoModelForCausalLM.from_config(twin_config(tiny_model(family).config)).eval()
    save_model(twin, tmp_path)
    assert logits_of(open_model(tmp_path), tiny_ids).equal(logits_of(twin, tiny_ids))


def test_shards_open(tiny_model, tiny_ids, tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert logits_of(open_model(tmp_path), tiny_ids).equal(logits_of(model, tiny_ids))
    next(tmp_path.glob("model-00002*")).unlink()
    assert "model-00002" in refused(tmp_path, "E301")


def test_transformers_settings_are_put_back(tiny_folder):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    open_model(tiny_folder("mixtral"))
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before


# --- Refusals ----------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("what", ["gate.weight", "experts.0.", "experts.7.", "lm_head"])
def test_a_missing_tensor_is_named_and_never_random(family, what, copied, capfd):
    folder = copied(family)
    lost = sorted(name for name in load_file(folder / "model.safetensors") if what in name)[-1]
    change(folder, lambda tensors: tensors.pop(lost))
    told = refused(folder, "E301")
    assert "missing" in told
    assert lost.split(".")[-2] in told
    assert capfd.readouterr() == ("", ""), "transformers' report was printed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, "no place"),
        ({"hidden_size": 64}, "another shape"),
        ({"num_local_experts": 4}, "4 experts"),
        ({"num_local_experts": 16}, "experts.8.w1.weight is missing"),
    ],
)
def test_weights_of_another_model_are_refused(changes, said, copied):
    folder = copied()
    configure(folder, **changes)
    assert said in refused(folder, "E301")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": "two"},
        {"num_hidden_layers": 2**63},
        {"num_attention_heads": 0},
        {"hidden_act": "nope"},
        {"rope_parameters": 3},
        {"dtype": "float99"},
        {"tie_word_embeddings": "x"},
        {"model_type": "nope"},
        {"model_type": ["mixtral"]},
        {"model_type": None},
    ],
    ids=str,
)
def test_an_impossible_config_is_one_line(changes, copied):
    folder = copied()
    configure(folder, **changes)
    refused(folder, "E305")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object_is_one_line(text, copied):
    folder = copied()
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder, "E301")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_counted(bad, copied):
    folder = copied()

    def spoil(tensors):
        tensors["lm_head.weight"][3, :2] = bad

    change(folder, spoil)
    assert "2 of 9600 numbers in lm_head.weight" in refused(folder, "E301")


def test_a_folder_without_manifest_is_said_to_be_unverified(copied, tiny_folder, caplog):
    with caplog.at_level(logging.WARNING):
        open_model(tiny_folder("mixtral"))
        assert not caplog.records
        open_model(copied())
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "no manifest, contents unverified"
    ]


def test_a_truncated_shard_says_how_much_is_there(tiny_folder, copied, tmp_path):
    for folder in (copied(), shutil.copytree(tiny_folder("mixtral"), tmp_path / "listed")):
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        assert f"{len(whole) - 100} of {len(whole)} bytes" in refused(folder, "E301")


def test_pickled_weights_are_refused_and_never_run(copied, tmp_path):
    folder, canary = copied(), tmp_path / "canary"
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return open, (str(canary), "w")

    torch.save(Evil(), folder / "pytorch_model.bin")
    assert "sandbox" in refused(folder, "E310")
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["mixtral", "nope"])
def test_code_in_the_folder_never_runs_and_nobody_is_asked(kind, copied, tmp_path, monkeypatch):
    folder, canary = copied(), tmp_path / "canary"
    (folder / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    )
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    configure(folder, auto_map=code, model_type=kind)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    if kind == "nope":
        refused(folder, "E305")
    else:
        assert type(open_model(folder)).__name__ == "MixtralForCausalLM"
    assert not canary.exists()


def test_a_folder_that_is_none_is_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing", "E305")
    assert "no config.json" in refused(tmp_path, "E305")
    with pytest.raises(ExpertlyError) as error:
        open_config(tmp_path)
    assert error.value.code == "E305"


def test_an_unknown_experts_implementation_names_the_nearest(tiny_folder):
    with pytest.raises(ExpertlyError, match="write grouped_mm") as error:
        load_weights(tiny_folder("mixtral"), experts_implementation="groupd_mm")
    assert error.value.code == "E202"


def test_a_save_that_fails_leaves_nothing(tiny_model, tmp_path):
    def write(folder):
        save_model(tiny_model("mixtral"), folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:40]}",
)
def test_a_machine_without_memory_is_no_bad_folder(error, tiny_folder, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        open_model(tiny_folder("mixtral"))
    assert caught.value is error


def test_any_other_error_of_transformers_is_one_line(tiny_folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a shape\nof nothing")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert "(RuntimeError: a shape of nothing)" in refused(tiny_folder("mixtral"), "E305")


def test_a_name_on_the_hub_is_to_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir DIR, then name DIR"
    assert hub in refused("mistralai/Mixtral-8x7B-v0.1", "E305")
    (tmp_path / "runs").mkdir()
    for name in ("runs/mine", "mine", "../up/mine", "a/b/c", tmp_path / "no" / "model"):
        assert "FIX: name a Hugging Face model folder" in refused(name, "E305")


def test_a_run_folder_names_its_newest_checkpoint(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.tmp", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()  # nothing in it
    assert refused(tmp_path, "E305").endswith(f"FIX: name {tmp_path / 'checkpoint-10'}")
