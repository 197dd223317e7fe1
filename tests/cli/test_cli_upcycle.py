"""expertly upcycle: every flag arrives, the page and the JSON say what was made."""

import dataclasses
import json
import re

import pytest
import torch

from expertly.folders import save_folder
from expertly.models.build import build_model, model_config
from expertly.models.loading import save_model
from expertly.upcycle.config import UpcycleConfig

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": 0,
}


@pytest.fixture(scope="module")
def dense(tiny_tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(model_config("llama", SIZES))
    target = tmp_path_factory.mktemp("dense") / "llama"
    return save_folder(target, lambda into: save_model(model, into, tokenizer=tiny_tokenizer))


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text("the cat sees the dog " * 200)
    return tmp_path / "words.txt"


def test_the_page(cli, dense, words, tmp_path):
    target = tmp_path / "moe"
    flags = ("--experts", 4, "--data", words, "--tokens", 128)
    code, out, err = cli("upcycle", dense, target, *flags)
    assert code == 0, err
    assert out.splitlines()[0] == "mixtral: 4 experts in each of 2 layers, top 2"
    for line in (
        r"^parameters   [\d,]+, active [\d,]+, \d+ kB$",
        r"^logits       differ by [\d.e-]+ at most: the same function$",
        r"^perplexity   ([\d.]+), the dense model's \1, on held-out text$",
        r"^cost         \d+ s, [\d.]+ [MG]B of memory$",
        rf"^folder       {re.escape(str(target))}$",
        rf"^try it       \S*expertly generate {re.escape(str(target))} --prompt ",
    ):
        assert re.search(line, out, re.M), (line, out)
    assert err.splitlines() == [
        "mixtral: 4 experts in 2 layers, top 2, " + re.search(r"\d+ kB", out)[0],
        "proof: both models on 128 held-out tokens, in float32",
    ]


def test_json(cli, dense, words, tmp_path):
    target = tmp_path / "moe"
    flags = ("--experts", 4, "--drop", 0.5, "--data", words, "--tokens", 128, "--json")
    code, out, _ = cli("upcycle", dense, target, *flags)
    said = json.loads(out)
    assert code == 0
    assert said["folder"] == str(target)
    assert (said["target"], said["num_experts"], said["top_k"]) == ("mixtral", 4, 2)
    assert said["exact"] is False and said["largest_logit_difference"] > 0
    assert said["perplexity"].keys() == {"dense", "moe"}
    assert said["peak_bytes"] > 10**7


def test_every_flag_arrives(cli, monkeypatch):
    """Every field of the config has a flag, and none has another's."""
    seen = []

    def run(config, say):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("expertly.upcycle.run.run", run)
    cli("upcycle", "a", "b")
    said = "--experts 32 --slices 4 --top-k 8 --every 2 --shared --drop 0.25 --drop-apart --noise 1"
    said += " --router clusters --target qwen2_moe --data x --data y --tokens 99 --seed 3"
    cli("upcycle", "a", "b", *said.split())
    wanted = UpcycleConfig(
        model="a",
        output_dir="b",
        num_experts=32,
        slices=4,
        top_k=8,
        every=2,
        shared=True,
        drop=0.25,
        drop_apart=True,
        noise=1.0,
        router="clusters",
        target="qwen2_moe",
        data=("x", "y"),
        tokens=99,
        seed=3,
    )
    assert seen == [UpcycleConfig(model="a", output_dir="b"), wanted]
    plain, set_all = map(dataclasses.asdict, seen)
    assert [key for key in plain if plain[key] == set_all[key]] == ["model", "output_dir"]
