"""Folders to damage, runs to disturb, and the command line: in this process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import place
from trials import LINE

from expertly.config import load
from expertly.folders import MANIFEST
from expertly.train import loop
from expertly.train.config import TrainConfig


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    """damaged(family, manifest) -> a copy of a tiny model's folder, to be spoilt."""

    def make(family="mixtral", *, manifest=True) -> Path:
        folder = shutil.copytree(tiny_folder(family), tmp_path / "model")
        if not manifest:
            (folder / MANIFEST).unlink()
        return folder

    return make


@pytest.fixture
def configure():
    """configure(folder, **changes): set keys of its config.json; None for a value removes none."""

    def change(folder: Path, **changes) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.fixture
def refused(cli, tmp_path, monkeypatch):
    """refused(folder, code, said, verbs): every verb that takes a folder says so, and no more."""
    (tmp_path / "words.txt").write_text("the cat sees the dog " * 400)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))

    def verb(name: str, folder: Path) -> list:
        if name != "train":
            return [*name.split(), folder]
        config = tmp_path / "run.yaml"
        source = {"path": str(tmp_path / "words.txt"), "eval": True}
        data = {"sources": [{**source, "eval": False, "domain": "a"}, {**source, "domain": "b"}]}
        data |= {"sequence_length": 16, "cache_dir": str(tmp_path / "cache")}
        said = {"output_dir": str(tmp_path / "run"), "model": {"path": str(folder)}, "data": data}
        config.write_text(json.dumps(said))
        return ["train", config]

    def check(folder, code, said, verbs=("inspect", "generate", "train")):
        before = contents(folder)
        for name in verbs:
            ended, out, err = cli(*verb(name, folder))
            last = err.splitlines(keepends=True)[-1]
            assert LINE.fullmatch(last), err
            assert (LINE.fullmatch(last)[1], ended, out) == (code, 3, ""), err
            assert said in last, last
            assert "Traceback" not in err
            if name != "train":  # which tells first how it got on with the data
                assert err in (last, f"{folder}: no manifest, contents unverified\n{last}"), err
        assert contents(folder) == before, "the folder was changed"
        assert not (tmp_path / "run").exists(), "a run was begun"
        assert not (folder / "canary").exists(), "code of the folder ran"

    return check


@pytest.fixture
def run_config(tmp_path):
    """run_config("name", *overrides) -> the config of a run in its own folder."""
    return lambda name, *more: load(
        TrainConfig, place().config, [f"output_dir={tmp_path / name}", *more]
    )


@pytest.fixture
def faults(monkeypatch):
    """faults("train.loss@5:nan", ...) orders them; without any there are none."""
    return lambda *orders: monkeypatch.setenv("EXPERTLY_FAULT", ",".join(orders))


@pytest.fixture
def watched(monkeypatch):
    """What every step did: (batch from 1, whether a weight moved, its Step)."""
    real, seen = loop.train_step, []

    def train_step(config, job, *rest):
        before = [each.detach().clone() for each in job.model.parameters()]
        done = real(config, job, *rest)
        same = all(map(torch.equal, before, job.model.parameters()))
        seen.append((job.batches.drawn // 4, not same, done))
        return done

    monkeypatch.setattr(loop, "train_step", train_step)
    return seen


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else "" for path in sorted(folder.rglob("*"))}
