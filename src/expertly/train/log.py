"""What a run tells while it runs: its records, TensorBoard, and a progress line for people."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from expertly.errors import ExpertlyError
from expertly.watch.records import METRICS, ROUTER, append_json


class RunLog:
    """Writes a run's records and shows its progress on stderr; close it at the end.

    tensorboard: also write scalars for it into RUN/tensorboard; those after the step `at`, which a
    stopped run left there, are taken back. Raises E207 when the package is missing.
    """

    def __init__(self, run: Path, *, max_steps: int, at: int = 0, tensorboard: bool = False):
        self._run = run
        self._console = Console(stderr=True, highlight=False)
        self._board: Any = None
        if tensorboard:
            self._board = board_writer()(str(run / "tensorboard"), purge_step=at + 1 if at else 0)
        self._max_steps = max_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("", total=max_steps, completed=at)
        self._progress.start()

    def say(self, line: str) -> None:
        """One line for the user."""
        self._console.print(line, markup=False, soft_wrap=True)

    def metrics(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl; its numbers also go to TensorBoard."""
        append_json(self._run / METRICS, record)
        if self._board is not None:
            for tag, value in _scalars(record):
                self._board.add_scalar(tag, value, record["step"])

    def router(self, record: dict[str, Any]) -> None:
        """A record of router.jsonl."""
        append_json(self._run / ROUTER, record)

    def advance(self, step: int, status: str, *, due: bool) -> None:
        """Move the bar; without a terminal print a plain line when one is due."""
        self._progress.update(self._task, completed=step, description=status)
        if due and not self._console.is_terminal:
            self.say(f"step {step}/{self._max_steps}  {status}")

    def close(self) -> None:
        """Stop the bar and flush."""
        self._progress.stop()
        if self._board is not None:
            self._board.close()


def say_to_stderr(line: str) -> None:
    """The plain form of RunLog.say, before there is a run."""
    sys.stderr.write(line + "\n")


def board_writer() -> Any:
    """TensorBoard's SummaryWriter. Raises E207 when the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        fix = "pip install 'expertly[tensorboard]'"
        why = "the package is not installed"
        raise ExpertlyError("E207", "tensorboard", why, fix=fix) from error
    return SummaryWriter


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """A record's nested numbers under TensorBoard tags: train/loss, eval/domain/code, moe/..."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif prefix and isinstance(value, int | float):
            yield prefix + key, value
