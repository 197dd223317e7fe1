"""Where a run begins, what may have changed, and what to do about too little memory."""

import pytest
import torch

from expertly.config import dump
from expertly.errors import ExpertlyError
from expertly.folders import save_folder, write_json
from expertly.train import start
from expertly.train.start import CONFIG, enough_memory, find_start, memory_in_use
from expertly.watch.records import METRICS


@pytest.fixture
def begun(configure, tmp_path):
    """A folder with a run's config, and that config."""
    config = configure(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(dump(config))
    return tmp_path / "run", config


def save(folder, step):
    return save_folder(folder / f"checkpoint-{step}", lambda to: write_json(to / "a.json", {}))


def find(folder, config, *, resume):
    said = []
    return find_start(folder, config, said.append, resume=resume), said


def test_an_empty_folder_is_begun(configure, tmp_path):
    config = configure(tmp_path)
    assert find(tmp_path, config, resume=False) == (None, [])
    found, said = find(tmp_path, config, resume=True)
    assert found is None
    assert said == [f"nothing to resume in {tmp_path}: starting from the beginning"]


def test_the_newest_is_gone_on_from(begun):
    folder, config = begun
    assert find(folder, config, resume=True) == (None, []), "stopped before its first"
    for step in (9, 10):
        newest = save(folder, step)
    assert find(folder, config, resume=True) == (newest, [])
    with pytest.raises(ExpertlyError, match=r"E205.*add --resume"):
        find(folder, config, resume=False)


def test_metrics_alone_are_a_run_too(configure, tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    for resume, fix in ((False, "add --resume"), (True, "put its config.yaml back")):
        with pytest.raises(ExpertlyError, match=f"E205.*holds a run already.*{fix}"):
            find(tmp_path, configure(tmp_path), resume=resume)


def test_what_was_learnt_belongs_to_its_config(begun, configure, tmp_path):
    folder, _ = begun
    other = configure(folder, "learning_rate=0.5")
    assert find(folder, other, resume=True) == (None, []), "nothing was learnt yet"
    save(folder, 3)
    with pytest.raises(ExpertlyError, match=r"E206.*optim.learning_rate: 0.01 -> 0.5\. FIX"):
        find(folder, other, resume=True)
    with pytest.raises(ExpertlyError, match=r"E206.*per_device_train_batch_size: 4 -> 2"):
        find(folder, configure(folder, "per_device_train_batch_size=2"), resume=True)
    for free in (
        ["logging_steps=2", "device=cpu", f"cache_dir={tmp_path / 'b'}"],
        ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"],
        ["optim.on_bad_step=stop", "router.on_collapse=rebalance"],
    ):
        found, _ = find(folder, configure(folder, *free), resume=True)
        assert found == folder / "checkpoint-3"


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        (
            ["per_device_train_batch_size=9", "gradient_accumulation_steps=3"],
            "add --resume schedule.per_device_train_batch_size=3 "
            "schedule.gradient_accumulation_steps=9",
        ),
        (["per_device_train_batch_size=1"], "add --resume schedule.gradient_checkpointing=true"),
        (
            ["per_device_train_batch_size=1", "schedule.gradient_checkpointing=true"],
            "start a new run with data.sequence_length=16",
        ),
    ],
)
def test_the_next_smaller_setting(given, fix, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "memory_in_use", lambda: 5 * 10**9)
    with pytest.raises(ExpertlyError) as caught, enough_memory(configure(tmp_path, *given)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert (caught.value.code, caught.value.exit_code) == ("E402", 4)
    assert str(caught.value) == (
        f"error[E402] training: out of memory: need 21 MB more, 5 GB in use. FIX: {fix}"
    )


def test_other_errors_pass(configure, tmp_path):
    for error in (RuntimeError("shapes"), OSError(28, "full"), ValueError("no")):
        with pytest.raises(type(error)) as caught, enough_memory(configure(tmp_path)):
            raise error
        assert caught.value is error


def test_memory_in_use_is_measured():
    before = memory_in_use()
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 10**7 < before <= memory_in_use() < 10**12
    del held
