"""The whole job on every make: the same function in stock transformers, or one line and nothing."""

import json
import os
import re
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertly.config import build
from expertly.folders import read_json, verify
from expertly.models.loading import open_model
from expertly.receipts import read
from expertly.train import loop
from expertly.train.config import TrainConfig
from expertly.upcycle import layout
from expertly.upcycle.run import run

IDS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(1))
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
CASES = [
    pytest.param("llama", {}, {}, "mixtral", id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, {}, "mixtral", id="tied"),
    pytest.param("llama", {}, {"slices": 4, "num_experts": 16, "top_k": 4}, "mixtral", id="slices"),
    pytest.param("llama", {}, {"slices": 4, "num_experts": 16, "top_k": 8}, "mixtral", id="two"),
    pytest.param("llama", {}, {"shared": True}, "qwen2_moe", id="shared"),
    pytest.param("llama", {}, {"shared": True, "slices": 2}, "qwen2_moe", id="shared-slices"),
    pytest.param("llama", {}, {"every": 2}, "qwen2_moe", id="every"),
    pytest.param("llama", {"head_dim": 16}, {}, "mixtral", id="heads"),
    pytest.param("llama", {}, {"router": "zero", "top_k": 1}, "mixtral", id="zero"),
    pytest.param("llama", {}, {"router": "clusters"}, "mixtral", id="clusters"),
    pytest.param("mistral", {"sliding_window": 16}, {}, "mixtral", id="mistral"),
    pytest.param("mistral", {"sliding_window": 16}, {"shared": True}, "qwen2_moe", id="window"),
    pytest.param("qwen2", {}, {}, "qwen2_moe", id="qwen2"),
    pytest.param("qwen2", {"sliding_window": 16, **SLIDING}, {}, "qwen2_moe", id="qwen2-some"),
    pytest.param("qwen3", {}, {}, "qwen3_moe", id="qwen3"),
    pytest.param("qwen3", {"attention_bias": True}, {"every": 2}, "qwen3_moe", id="qwen3-bias"),
    pytest.param("gemma", {"head_dim": 8}, {}, "mixtral", id="gemma"),
    pytest.param("olmo2", {}, {"slices": 2}, "flex_olmo", id="olmo2"),
]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("family", "keys", "config", "target"), CASES)
def test_stock_transformers_computes_the_same(upcycle, dense_folder, family, keys, config, target):
    made = upcycle(family, keys=keys, **config)
    assert json.loads((made.folder / "config.json").read_text())["model_type"] == target
    dense, moe = logits(dense_folder(family, **keys)), logits(made.folder)
    torch.testing.assert_close(moe, dense, atol=2e-5, rtol=1e-4)
    assert made.exact and made.largest_logit_difference < 1e-4
    receipt = read(made.folder)
    assert receipt.verdict == "pass"
    assert receipt.figures["perplexity"]["moe"] == pytest.approx(made.perplexity["dense"], rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"drop": 0.5}, {"drop": 0.5, "drop_apart": True, "slices": 2}, {"noise": 0.1, "shared": True}],
    ids=["drop", "drop-apart-slices", "noise-shared"],
)
def test_what_changes_the_function_on_purpose_says_by_how_much(upcycle, dense_folder, change):
    made = upcycle("llama", **change)
    difference = (logits(made.folder) - logits(dense_folder("llama"))).abs().max()
    receipt = read(made.folder)
    assert not made.exact and receipt.verdict == "pass"
    assert receipt.figures["function"] == "changed on purpose"
    assert float(difference) > 0.01 and made.largest_logit_difference > 0.01
    assert not any("logit" in check.name for check in receipt.checks), "it is no check"
    assert made.perplexity["moe"] != made.perplexity["dense"]


def test_the_same_job_makes_the_same_bytes(upcycle):
    config = {"drop": 0.5, "noise": 0.1, "num_experts": 4}
    one, two = (upcycle("llama", out=name, **config) for name in ("one", "two"))
    other = upcycle("llama", out="other", seed=1, **config)
    weights = [(each.folder / "model.safetensors").read_bytes() for each in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]


# --- The folder --------------------------------------------------------------------------------


def test_the_folder_is_whole_and_what_others_need_is_in_it(upcycled, dense_folder, tiny_tokenizer):
    made, dense = upcycled("llama"), dense_folder("llama")
    names = {file.name for file in made.folder.iterdir()}
    assert names == {
        "MANIFEST.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "receipt.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert verify(made.folder)
    listed = read_json(made.folder / "MANIFEST.json")["files"]
    assert {*listed} == names - {"MANIFEST.json"}
    for name in ("generation_config.json", "tokenizer.json"):
        assert (made.folder / name).read_bytes() == (dense / name).read_bytes()
    config = read_json(made.folder / "config.json")
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["dtype"] == "float32"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)


def test_inspect_agrees_with_what_was_said(upcycled, cli):
    made = upcycled("llama")
    code, out, _ = cli("inspect", made.folder, "--json")
    said = json.loads(out)
    assert code == 0
    for key, wanted in {
        "family": "mixtral",
        "moe_layers": made.moe_layers,
        "experts": made.num_experts,
        "top_k": made.top_k,
        "total": made.parameters,
        "active": made.active_parameters,
        "verified": True,
    }.items():
        assert said[key] == wanted, key


def test_it_opens_and_training_goes_on_from_it(upcycled, text, tmp_path):
    made = upcycled("llama", num_experts=2)
    model = open_model(made.folder, verify=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    given = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(made.folder)},
        "data": {
            "sources": [{"path": text}],
            "sequence_length": 16,
            "cache_dir": str(tmp_path / "cache"),
        },
        "schedule": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    loop.run(build(TrainConfig, given))
    assert read(tmp_path / "run").verdict == "pass"


def test_progress_is_told_once_in_a_while(upcycle_config, monkeypatch):
    said = []
    run(upcycle_config("llama", num_experts=2), said.append)
    assert len(said) == 2 and said[0].startswith("mixtral: 2 experts in 2 layers, top 2, ")
    assert re.fullmatch(r"proof: both models on \d+ held-out tokens, in float32", said[1])
    monkeypatch.setattr("expertly.upcycle.run._EVERY", -1.0)
    run(upcycle_config("llama", num_experts=2, out="other"), said.append)
    assert any(line.startswith("writing: ") for line in said[2:])


# --- What ends it ------------------------------------------------------------------------------


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(deed): every expert's matrix goes through it."""

    def spoil(deed):
        real = layout.expert_matrix
        monkeypatch.setattr(layout, "expert_matrix", lambda *given: deed(real(*given)))

    return spoil


def raising(error):
    def deed(tensor):
        raise error

    return deed


def stop(tensor):
    os.kill(os.getpid(), signal.SIGTERM)
    return tensor


@pytest.mark.parametrize(
    ("deed", "code", "said"),
    [
        pytest.param(lambda x: x * 1.01, 1, r"error\[E101\] largest logit diff", id="wrong"),
        pytest.param(raising(KeyboardInterrupt()), 130, "stopped", id="Ctrl-C"),
        pytest.param(stop, 143, "stopped", id="SIGTERM"),
        pytest.param(raising(MemoryError()), 4, r"error\[E402\]", id="memory"),
        pytest.param(raising(OSError(28, "no space")), 4, r"error\[E401\].*disk full", id="disk"),
        pytest.param(raising(RuntimeError("bug")), 6, r"error\[E999\]", id="bug"),
    ],
)
def test_whatever_ends_it_nothing_is_left(
    deed, code, said, spoilt, cli, dense_folder, text, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path.parent))
    spoilt(deed)
    target = tmp_path / "moe"
    ended, out, err = cli("upcycle", dense_folder("llama"), target, "--data", text)
    assert (ended, out) == (code, "")
    assert re.match(f"expertly: {said}", err.splitlines()[-1]), err
    assert list(tmp_path.iterdir()) == []
