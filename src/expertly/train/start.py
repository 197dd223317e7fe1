"""Where a run begins: anew, from its newest whole checkpoint, or from one that it goes back to."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from expertly.config import differences, load
from expertly.errors import ExpertlyError
from expertly.folders import checkpoints
from expertly.memory import is_out_of_memory, memory_error
from expertly.train.checkpoint import whole_checkpoint
from expertly.train.config import TrainConfig
from expertly.watch.records import METRICS

CONFIG = "config.yaml"
# what may change between a run and its resumption: what it learns does not hang on it, or the
# change is the answer to what ended the run
_FREE = (
    "log.",
    "output_dir:",
    "device:",
    "data.cache_dir:",
    "optim.on_bad_step:",
    "optim.spike_sigmas:",
    "optim.max_bad_steps:",
    "router.on_collapse:",
    "schedule.gradient_checkpointing:",
)
_SPLIT = ("schedule.per_device_train_batch_size:", "schedule.gradient_accumulation_steps:")


def find_start(
    folder: Path, config: TrainConfig, say: Callable[[str], None], *, resume: bool
) -> Path | None:
    """The checkpoint to go on from; None: from the beginning.

    A run that was stopped before its first checkpoint starts again from the beginning, also with
    another config, and so does one that was never begun. Raises E205 for a run in the way, E206
    for a changed config, and what whole_checkpoint raises.
    """
    there = (folder / CONFIG).exists()
    if resume and there:
        if checkpoints(folder):  # before the first, nothing was learnt under the old config
            _refuse_changes(folder, config)
        return whole_checkpoint(folder, say)
    if there or (folder / METRICS).exists() or checkpoints(folder):
        fix = "add --resume to go on with it, or name another output_dir"
        if resume:
            fix = f"put its {CONFIG} back, or name another output_dir"
        raise ExpertlyError("E205", str(folder), "holds a run already", fix=fix)
    if resume:
        say(f"nothing to resume in {folder}: starting from the beginning")
    return None


@contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Turns a failed allocation into E402, with the next smaller setting to try."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        in_use = memory_in_use()
        raise memory_error("training", error, fix=_smaller(config), in_use=in_use) from error


def memory_in_use() -> int:
    """The most memory that this process has had, in bytes: the GPU's, where one is used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _smaller(config: TrainConfig) -> str:
    """What to try next: the same rows in more micro-batches, then what costs time or context."""
    schedule = config.schedule
    rows, size = schedule.per_device_train_batch_size, schedule.gradient_accumulation_steps
    if rows > 1:
        parts = next(part for part in range(2, rows + 1) if rows % part == 0)
        fewer = f"schedule.per_device_train_batch_size={rows // parts}"
        return f"add --resume {fewer} schedule.gradient_accumulation_steps={size * parts}"
    if not schedule.gradient_checkpointing:
        return "add --resume schedule.gradient_checkpointing=true"
    shorter = max(2, config.data.sequence_length // 2)
    return f"start a new run with data.sequence_length={shorter}"


def _refuse_changes(folder: Path, config: TrainConfig) -> None:
    """Raises E206 when a resumed run would no longer be the same run."""
    before = load(TrainConfig, folder / CONFIG)
    same_rows = before.schedule.rows_per_step == config.schedule.rows_per_step
    free = _FREE + (_SPLIT if same_rows else ())
    changed = [line for line in differences(before, config) if not line.startswith(free)]
    if changed:
        fix = "resume with the run's own config.yaml, or start a new run"
        raise ExpertlyError("E206", str(folder), "; ".join(changed), fix=fix)
