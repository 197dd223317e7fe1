"""What a run tells: metrics.jsonl and router.jsonl for machines, a progress line for people."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from expertly.errors import ExpertlyError
from expertly.folders import disk_error, save_file

METRICS, ROUTER = "metrics.jsonl", "router.jsonl"


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


def append_json(file: Path, record: dict[str, Any]) -> None:
    """Append one record as a line. Raises E401 when the disk refuses."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(_line(record))
    except OSError as error:
        raise disk_error(file, error) from error


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none when it is missing. A torn last line is left out.

    Raises E301 for any other line that is not JSON.
    """
    if not file.is_file():
        return []
    whole = file.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        fix = "take the lines out that are not JSON"
        raise ExpertlyError("E301", str(file), f"is damaged ({error})", fix=fix) from error


def last_health(run: Path) -> dict[str, Any] | None:
    """The watch set that a run wrote down last; None before the first and for a dense model."""
    watched = [record["moe"] for record in read_records(run / METRICS) if "moe" in record]
    return watched[-1] if watched else None


def forget_after(run: Path, step: int) -> None:
    """Take back what a run wrote down after the checkpoint that it resumes from."""
    for file in (run / METRICS, run / ROUTER):
        if file.exists():
            kept = [record for record in read_records(file) if record["step"] <= step]
            save_file(file, "".join(map(_line, kept)))


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


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """A record's nested numbers under TensorBoard tags: train/loss, eval/domain/code, moe/..."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif prefix and isinstance(value, int | float):
            yield prefix + key, value
