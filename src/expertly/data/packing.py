"""Packing: short examples share a row of tokens, and are kept apart in it.

Positions begin at 0 in each example; transformers keeps attention inside of them by that alone.
Padding behind the last one has position 0 throughout, so each of its tokens is by itself. Models
that do not keep examples apart (models/apart.py) have them one a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from expertly.data.batches import Batch, batch_of
from expertly.data.examples import Example, ExampleSet
from expertly.errors import ExpertlyError

_Row = list[Example]


class PackedSet:
    """The training rows of an example set, as Batches draws them. together: as in `pack`."""

    def __init__(self, examples: ExampleSet, length: int, *, together: bool = True):
        self.domain, self.digest = examples.domain, examples.digest
        self.trains = examples.trains
        self.size = sum(len(each.ids) for each in examples.train)
        self._packed = pack(examples.train, length, together=together)

    def count(self, length: int) -> int:
        """How many rows there are."""
        return len(self._packed)

    def row(self, place: int, length: int) -> tuple[np.ndarray, ...]:
        """Tokens, what of them is learnt, and positions: (seq,) each."""
        return laid_out(self._packed[place], length)


def pack(examples: Sequence[Example], length: int, *, together: bool = True) -> list[_Row]:
    """Examples of at most `length` tokens together in rows of so many: best fit, longest first.

    The same examples make the same rows. together: False gives each a row of its own.
    """
    if not together:
        return [[example] for example in examples]
    rows: list[_Row] = []
    rooms: list[int] = []  # sorted: how much some rows have left
    by_room: dict[int, list[_Row]] = {}
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room = length
            rows.append([])
            row = rows[-1]
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        row.append(example)
        if not by_room.setdefault(room - size, []):
            insort(rooms, room - size)
        by_room[room - size].append(row)
    return rows


def laid_out(row: _Row, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples one behind the other: tokens, what of them is learnt, positions; (seq,) each."""
    ids, places = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
    learnt = np.zeros(length, dtype=bool)
    start = 0
    for example in row:
        end = start + len(example.ids)
        ids[start:end], learnt[start:end] = example.ids, example.learnt
        places[start:end] = np.arange(end - start)
        start = end
    return ids, learnt, places


def packed_eval_batches(
    sets: Sequence[ExampleSet],
    *,
    batch_size: int,
    sequence_length: int,
    eval_tokens: int,
    together: bool = True,
) -> list[Batch]:
    """The held-out examples of each domain, about `eval_tokens` of them, always the same rows.

    A batch holds one domain. Raises E303 when no domain has any.
    """
    batches = []
    for index, each in enumerate(sets):
        first = _first(each.held_out, eval_tokens)
        packed = pack(first, sequence_length, together=together)
        rows = [laid_out(row, sequence_length) for row in packed]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batches.append(batch_of(part, [index] * len(part)))
    if not batches:
        fix = "add rows, or a source with eval: true"
        raise ExpertlyError("E303", "data.sources", "no row is held out", fix=fix)
    return batches


def _first(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first examples, up to so many tokens, but one at least."""
    ends = np.cumsum([len(each.ids) for each in examples])
    return list(examples[: max(1, int((ends <= tokens).sum()))])
