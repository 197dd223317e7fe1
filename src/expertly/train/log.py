"""What a run tells while it runs: its records, TensorBoard, and a progress line for people.

Nothing here ends a run that is under way: a record that the disk refuses waits, a tracker that
fails is left out.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from expertly.errors import ExpertlyError
from expertly.faults import strike
from expertly.watch.records import METRICS, ROUTER, append_json, forget_after

_WAITING = 10_000  # records at most, should the disk stay full


class _Console(Console):
    """A console whose reader may leave: rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class RunLog:
    """Writes a run's records and shows its progress on stderr; close it at the end.

    tensorboard: also write scalars for it into RUN/tensorboard. Raises E207 when the package is
    missing.
    """

    def __init__(self, run: Path, *, tensorboard: bool = False):
        self._run = run
        self._console = _Console(stderr=True, highlight=False)
        self._waiting: deque[tuple[Path, dict[str, Any]]] = deque(maxlen=_WAITING)
        self._warned = False
        self._new_board = board_writer() if tensorboard else None
        self._board: Any = None
        self._max_steps = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("", total=None)
        self._progress.start()

    def say(self, line: str) -> None:
        """One line for the user."""
        try:
            self._console.print(line, markup=False, soft_wrap=True)
        except OSError:  # a full disk behind 2>log, a terminal that is gone
            self._console.quiet = True

    def metrics(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl; its numbers also go to TensorBoard."""
        self._append(METRICS, record)
        if self._board is not None:
            with self._tracking():
                strike("log.board", record["step"])
                for tag, value in _scalars(record):
                    self._board.add_scalar(tag, value, record["step"])

    def router(self, record: dict[str, Any]) -> None:
        """A record of router.jsonl."""
        self._append(ROUTER, record)

    def advance(self, step: int, status: str, *, due: bool) -> None:
        """Move the bar; without a terminal print a plain line when one is due."""
        self._progress.update(self._task, completed=step, description=status)
        if due and not self._console.is_terminal:
            self.say(f"step {step}/{self._max_steps}  {status}")

    def begin(self, at: int | None, max_steps: int) -> None:
        """Go on behind step `at`: records of later steps are taken back. None: from the start."""
        # what waits of earlier steps is not taken back: no later step will write it again
        early = (kept for kept in self._waiting if at is not None and kept[1]["step"] <= at)
        self._waiting = deque(early, maxlen=_WAITING)
        forget_after(self._run, -1 if at is None else at)
        self._max_steps = max_steps
        self._progress.update(self._task, completed=at or 0, total=max_steps)
        if self._new_board is not None:
            self._close_board()
            with self._tracking():
                strike("log.board", "open")
                folder, first = str(self._run / "tensorboard"), at + 1 if at else 0
                self._board = self._new_board(folder, purge_step=first)

    def close(self) -> None:
        """Stop the bar, write what waits, flush."""
        self._progress.stop()
        self._write()
        if self._waiting:
            self.say(f"warning: {len(self._waiting)} records are lost, the disk did not take them")
        self._close_board()

    def _close_board(self) -> None:
        if self._board is not None:
            with self._tracking():
                strike("log.board", "close")
                self._board.close()

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        """For what is done with the tracker: when it fails, the run goes on without."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  other people's code, and not worth a run
            self._board = None
            self.say(f"warning: tensorboard is left out from now on ({error})")

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self._waiting.append((self._run / name, record))
        self._write()

    def _write(self) -> None:
        """Write the records that wait, oldest first, as far as the disk takes them."""
        try:
            while self._waiting:
                append_json(*self._waiting[0])
                self._waiting.popleft()
        except ExpertlyError as error:
            if not self._warned:
                self.say(f"warning: {error}. Training goes on, the records wait")
            self._warned = True


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
