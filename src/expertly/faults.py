"""Faults on purpose, so that tests of bad days need no mocks: EXPERTLY_FAULT=point[@where]:kind.

Several orders are divided by commas. An order without `@where` holds everywhere. Nothing happens
unless the variable is set.
"""

import errno
import os
import signal

from expertly.errors import ExpertlyError, nearest

VARIABLE = "EXPERTLY_FAULT"

# where faults can happen, and what `where` says there
POINTS = {
    "save.begun": "name of the folder to be saved",
    "save.written": "name of the folder",
    "save.sealed": "name of the folder",
    "save.renamed": "name of the folder",
    "train.step": "number of the batch, from 1",
    "train.loss": "number of the batch, from 1",
    "log.metrics": "step",
    "log.board": "step, open or close",
}
_DEEDS = ("kill", "term", "full", "readonly", "memory", "error")
_VALUES = {"nan": float("nan"), "inf": float("inf"), "spike": 10.0}


def injected(point: str, where: object = "") -> str | None:
    """The kind of fault that was ordered for here, if any. Raises E209 for an unknown one."""
    assert point in POINTS, f"give {point} a line in POINTS"
    for order in filter(None, os.environ.get(VARIABLE, "").split(",")):
        place, _, kind = order.partition(":")
        name, _, at = place.partition("@")
        _check(name, kind)
        if name == point and at in ("", str(where)):
            return kind
    return None


def strike(point: str, where: object = "") -> None:
    """Have the fault that was ordered for here: a signal to ourselves, or an error."""
    kind = injected(point, where)
    if kind in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    if kind in ("full", "readonly"):
        number = errno.ENOSPC if kind == "full" else errno.EROFS
        raise OSError(number, os.strerror(number))
    if kind == "memory":
        raise MemoryError("injected: you tried to allocate 1073741824 bytes")
    if kind == "error":
        raise RuntimeError(f"injected at {point}")


def factor(point: str, where: object = "") -> float:
    """What a number is multiplied by here: 1, unless nan, inf or a spike (10) was ordered."""
    return _VALUES.get(injected(point, where) or "", 1.0)


def _check(name: str, kind: str) -> None:
    if name not in POINTS:
        why = f"no such point {name!r}"
        raise ExpertlyError("E209", VARIABLE, why, fix=nearest(name, POINTS))
    if kind not in (*_DEEDS, *_VALUES):
        why = f"no such kind {kind!r}"
        raise ExpertlyError("E209", VARIABLE, why, fix=nearest(kind, (*_DEEDS, *_VALUES)))
