"""Too little memory, changed inputs, damaged checkpoints: what a run makes of them."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import announced, contents, place, require_nothing_lost, require_same

from expertly.config import load
from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST, checkpoints
from expertly.train import loop
from expertly.train.config import TrainConfig

# --- B14: out of memory -------------------------------------------------------------------------


def test_b14_the_advice_after_out_of_memory_works(tmp_path):
    """A real limit, on what a process may take beyond what it has after its imports."""
    server, config, _, _ = place()
    run = tmp_path / "run"
    settings = ["max_steps=1", "per_device_train_batch_size=512"]
    advised = []
    for _ in range(6):
        process = server.start(config, run, *settings, *advised, limits={"RLIMIT_AS": 128 * 2**20})
        code, said = process.code(), process.said()
        if code == 0:
            break
        assert code == 4, said
        line = said.splitlines()[-1]
        found = re.fullmatch(
            r"expertly: error\[E402\] training: out of memory(?:: need \S+ [kMG]B more)?, "
            r"\S+ [kMG]B in use\. FIX: add --resume (.+)",
            line,
        )
        assert found, said
        advised = found[1].split()
    assert code == 0, said
    assert advised, "it was too little memory at first"
    assert checkpoints(run)[-1].name == "checkpoint-1"
    require_nothing_lost(run, [1])


def test_b14_a_gpu_that_is_full(run_config, monkeypatch):
    def train_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a")

    monkeypatch.setattr(loop, "train_step", train_step)
    settings = ["per_device_train_batch_size=1", "schedule.gradient_checkpointing=true"]
    for given, fix in (
        ([], "per_device_train_batch_size=2 schedule.gradient_accumulation_steps=2"),
        (settings[:1], "add --resume schedule.gradient_checkpointing=true"),
        (settings, "start a new run with data.sequence_length=16"),
    ):
        with pytest.raises(ExpertlyError, match="E402") as caught:
            loop.run(run_config(f"run-{len(given)}", *given))
        assert caught.value.exit_code == 4
        assert re.search(r"need 2.68 GB more, .* in use\. FIX: ", str(caught.value))
        assert str(caught.value).endswith(fix)


# --- B17: changed inputs ------------------------------------------------------------------------


def test_b17_a_resume_with_something_changed(tmp_path):
    texts = shutil.copytree(place().config.parent, tmp_path / "texts", ignore=only_texts)
    file = texts / "run.yaml"
    file.write_text(place().config.read_text().replace(str(place().config.parent), str(texts)))
    run, tokenizer = tmp_path / "run", tmp_path / "tokenizer"
    shutil.copytree(place().unbroken / "checkpoint-3", tokenizer)
    of_folder = [f"output_dir={run}", f"data.tokenizer={tokenizer}", "max_steps=3"]

    def again(*more):
        return load(TrainConfig, file, [*of_folder, *more])

    loop.run(again())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(said, *more):
        with pytest.raises(ExpertlyError, match=said) as caught:
            loop.run(again(*more), resume=True)
        assert (caught.value.code, caught.value.exit_code) == ("E206", 2)
        after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert after.keys() == before.keys()
        assert all(after[path] == before[path] for path in after if path.name != ".lock")

    refused(r"optim.learning_rate: 0.003 -> 0.1\. FIX", "learning_rate=0.1")
    refused("schedule.per_device_train_batch_size: 4 -> 2", "per_device_train_batch_size=2")
    other = shutil.copytree(tokenizer, tmp_path / "other")
    refused(r"data.tokenizer: \S+/tokenizer. -> \S+/other", f"data.tokenizer={other}")
    words = (texts / "words.txt").read_text()
    with changed(texts / "words.txt", words.replace("red", "blue")):
        refused(r"data order \((tokens|shares)\): was .*, is ")
    core = json.loads((tokenizer / "tokenizer.json").read_text())
    with changed(tokenizer / "tokenizer.json", json.dumps(renumbered(core))):
        refused(r"data order \(tokens\): was .*, is ")
    assert loop.run(again(), resume=True).steps == 3


@contextmanager
def changed(file, text):
    before = file.read_text()
    file.write_text(text)
    yield
    file.write_text(before)


def renumbered(core):
    """A tokenizer's JSON with other ids for the same pieces; the end of text keeps its 0."""
    vocab = core["model"]["vocab"]
    core["model"]["vocab"] = {token: -number % len(vocab) for token, number in vocab.items()}
    return core


def only_texts(folder, names):
    return [name for name in names if not name.endswith(".txt")]


# --- B18: damaged checkpoints -------------------------------------------------------------------


def flip(checkpoint):
    file = checkpoint / "expertly/optimizer.safetensors"
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 4
    file.write_bytes(spoilt)


def cut(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


def emptied(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(flip, "sha256 mismatch", id="flipped"),
        pytest.param(cut, r"\d+ of \d+ bytes", id="cut"),
        pytest.param(without_a_manifest, "its MANIFEST.json is missing", id="no manifest"),
        pytest.param(emptied, "its MANIFEST.json is missing", id="empty"),
    ],
)
def test_b18_the_one_before_the_damaged_newest(spoil, why, run_config, capsys):
    unbroken = place().unbroken
    config = run_config("run")
    run = Path(config.output_dir)
    shutil.copytree(unbroken, run, ignore=shutil.ignore_patterns("receipt.json", "checkpoint-24"))
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(unbroken), str(run))
    )
    spoil(run / "checkpoint-21")
    result = loop.run(config, resume=True)
    said = capsys.readouterr().err
    assert re.search(rf"checkpoint-21\S*: {why}. Kept as checkpoint-21.damaged\n", said)
    assert "going on from checkpoint-18, the newest whole checkpoint" in said
    assert announced(said) == [21, 24]
    assert (run / "checkpoint-21.damaged").is_dir()
    assert contents(run / "checkpoint-21") == contents(unbroken / "checkpoint-21")
    require_same(result.run, unbroken)
