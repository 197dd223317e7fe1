"""Thousands of damaged folders: each is one line or a right load; none is wrong but accepted."""

import json
import os
import shutil
import signal
from collections import Counter
from functools import partial

import mutants
import pytest
import torch
import trials

from expertly.folders import MANIFEST, save_folder
from expertly.models.loading import open_model

LIMIT = 30  # seconds: a hang, on however slow a machine; benchmarks/mutants.py asks for 2


@pytest.fixture(scope="module")
def shards(tiny_model, tmp_path_factory):
    """Two saves of one model in shards, with manifests; the second has other weights."""
    root = tmp_path_factory.mktemp("shards")
    for name, seed in (("one", 0), ("two", 1)):
        model = tiny_model("mixtral", seed=seed)
        save_folder(root / name, lambda to, m=model: m.save_pretrained(to, max_shard_size="90KB"))
    return root / "one", root / "two"


def test_no_damaged_weights_are_accepted(shards, tmp_path, count):
    folder = shutil.copytree(shards[0], tmp_path / "mine")
    original = open_model(folder).state_dict()
    trial = trials.Trial(
        partial(mutants.weight_mutant, *shards),
        partial(open_model, verify=True),
        partial(trials.same_bits, original=original),
    )
    found = Counter(trials.try_all(trial, folder, range(count(300, 10_000)), LIMIT))
    assert set(found) <= {"one line", "right"}, found
    assert found["one line"] > 0.9 * found.total()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_no_impossible_config_is_accepted(family, tiny_folder, tmp_path, count):
    folder = shutil.copytree(tiny_folder(family), tmp_path / "mine")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    trial = trials.Trial(
        partial(mutants.config_mutant, config),
        open_model,
        partial(trials.same_model, original=open_model(folder).state_dict()),
    )
    numbers = range(count(75, 2_500))
    outcomes = trials.try_all(trial, folder, numbers, LIMIT)
    bad = [
        (n, said) for n, said in zip(numbers, outcomes, strict=True) if said[:2] not in ("on", "ri")
    ]
    assert not bad, [(said, trial.mutant(n)) for n, said in bad[:3]]
    assert {"one line", "right"} <= set(outcomes)


# --- The judges themselves can say no ----------------------------------------------------------


def test_a_hang_and_a_crash_are_told_and_the_rest_is_tried(shards, tmp_path):
    def load(folder):
        number = int((folder / "config.json").read_text())
        if number == 1:
            while True:
                pass
        if number == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 3:
            raise RecursionError
        return number

    (tmp_path / "config.json").write_text("{}")
    trial = trials.Trial(
        lambda n: mutants.Mutant("", {"config.json": str(n).encode()}), load, lambda n: n != 4
    )
    told = trials.try_all(trial, tmp_path, range(6), 2)
    assert told == ["right", "hang", "crash", "error: RecursionError", "WRONG", "right"]
    assert (tmp_path / "config.json").read_text() == "{}"


def test_the_judges_see_one_bit_and_one_nan(tiny_model):
    model = tiny_model("mixtral")
    original = {name: value.clone() for name, value in model.state_dict().items()}
    assert trials.same_bits(model, original)
    assert trials.same_model(model, original)
    with torch.no_grad():
        model.lm_head.weight.view(torch.int32)[0, 0] ^= 1
    assert not trials.same_bits(model, original)
    assert trials.same_model(model, original)
    model.config.rms_norm_eps = model.model.norm.variance_epsilon = float("nan")
    assert not trials.same_model(model, original)
    assert not trials.same_model(model, {**original, "more": torch.zeros(1)})


def test_a_mutant_is_a_function_of_its_number(shards):
    for number in range(30):
        once, again = (mutants.weight_mutant(*shards, number) for _ in range(2))
        assert once == again
    kinds = {mutants.weight_mutant(*shards, number).kind for number in range(200)}
    assert len(kinds) == 10
