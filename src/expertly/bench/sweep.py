"""Overhead as it is beside real weights: what Python and libraries need has to be fetched again.

In every layer of a real model its weights pass through the caches and drive out all else. Between
the calls of a tiny model nothing does. So as many bytes are read there, while the clock stands
still.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from expertly.bench.machine import read
from expertly.bench.steps import parted
from expertly.models.loading import Model

_WORDS = 2**28  # bytes to go through, again and again: more than all but large servers' caches


class Sweep:
    """A clock that stands still while it reads memory."""

    def __init__(self) -> None:
        self._words = torch.ones(_WORDS // 8, dtype=torch.int64)
        self._next, self._paused = 0, 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._paused

    def read(self, size: float) -> None:
        """Read so many bytes."""
        started, left = time.perf_counter(), int(size) // 8
        while left > 0:
            piece = self._words[self._next : self._next + left]
            read(piece)
            left -= len(piece)
            self._next = (self._next + len(piece)) % len(self._words)
        self._paused += time.perf_counter() - started


@contextmanager
def swept(
    model: Model, sweep: Sweep, touched: Mapping[str, float], *, whole: bool = False
) -> Iterator[None]:
    """While it lasts, memory is read before every part of a model.

    touched: bytes that a step of the real one reads, by part; its modules share them evenly. whole:
    all of it before the model, which then runs as if nobody looked inside.
    """
    parts = list(parted(model))
    many = Counter(part for part, _ in parts)

    def before(size: float) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: sweep.read(size)

    places = [(module, touched.get(part, 0.0) / many[part]) for part, module in parts]
    if whole:
        places = [(model, sum(touched.values()))]
    handles = [module.register_forward_pre_hook(before(size)) for module, size in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
