"""Being told to stop: the first signal asks a run to save and end, the second ends it at once."""

import itertools
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

from expertly.errors import Stopped

Item = TypeVar("Item")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """While it is entered, the first SIGTERM or Ctrl-C only sets `signum`; the second raises.

    Signals reach a process's main thread only; entered in another one it does nothing.
    """

    def __init__(self) -> None:
        self.signum = 0  # of the signal that came; 0: none
        self._before: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """Whether the run should save and end."""
        return self.signum != 0

    def until(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, as long as nobody asks to stop."""
        return itertools.takewhile(lambda _: not self.asked, items)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._heard) for each in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Stopped(signum)
        self.signum = signum
