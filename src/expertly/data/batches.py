"""Batches: rows of packed tokens, drawn from the domains in an order that can be resumed.

What a row is, its domain says: `sequence_length` tokens of one stream, where documents are divided
by end-of-text and by no mask (cache.py), or examples that are kept apart (packing.py). Last step of
this room: what comes out goes to the model.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from expertly.data.cache import TokenSet
from expertly.errors import ExpertlyError


class Batch(NamedTuple):
    """Rows of tokens; labels are the same tokens, shifted by the model."""

    input_ids: torch.Tensor  # (batch, seq) int64
    domains: torch.Tensor  # (batch,) int64, index into the token sets
    attention_mask: torch.Tensor | None = None  # (batch, seq) int64; None: nothing is padded
    # of rows whose examples are kept apart, where a token at position 0 is the first of one, or
    # behind the last one padding
    learnt: torch.Tensor | None = None  # (batch, seq) bool, what the model learns to write
    position_ids: torch.Tensor | None = None  # (batch, seq) int64


class Rows(Protocol):
    """A domain to train on."""

    @property
    def domain(self) -> str:
        """Its name."""

    @property
    def digest(self) -> str:
        """The sha256 of what is trained on."""

    @property
    def trains(self) -> bool:
        """Whether anything is."""

    @property
    def size(self) -> int:
        """Tokens to train on."""

    def count(self, length: int) -> int:
        """How many rows of so many tokens there are. Raises E303 when there is none."""

    def row(self, place: int, length: int) -> tuple[np.ndarray, ...]:
        """One of them: its tokens (seq,), and where examples are kept apart learnt and positions"""


class Batches(Iterator[Batch]):
    """Endless training batches; their order is a pure function of the seed and the position.

    Rows of a domain come in an order of their own in every epoch of that domain. Domains take
    turns so that after any number of rows each has its share of them, to within one row.
    """

    def __init__(
        self,
        token_sets: Sequence[Rows],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
    ) -> None:
        """Weights are per training domain; None means in proportion to their tokens.

        Raises E303 for a training domain with less than one row, E202 for a missing weight.
        """
        self._sets = {index: each for index, each in enumerate(token_sets) if each.trains}
        if not self._sets:
            fix = "add a source without eval"
            raise ExpertlyError("E303", "data.sources", "nothing to train on", fix=fix)
        self._batch_size, self._length, self._seed = batch_size, sequence_length, seed
        self._rows = {index: each.count(sequence_length) for index, each in self._sets.items()}
        self._weights = _shares(self._sets, weights)
        self._drawn = dict.fromkeys(self._sets, 0)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __next__(self) -> Batch:
        """The next `batch_size` rows."""
        drawn = [self._draw() for _ in range(self._batch_size)]
        return batch_of([row for _, row in drawn], [index for index, _ in drawn])

    @property
    def rows_per_epoch(self) -> int:
        """The rows that all domains have together."""
        return sum(self._rows.values())

    @property
    def drawn(self) -> int:
        """How many rows were drawn since the beginning."""
        return sum(self._drawn.values())

    def state(self) -> dict:
        """The position and what it belongs to; JSON-able, a line per domain."""
        drawn = {each.domain: self._drawn[index] for index, each in self._sets.items()}
        return {"drawn": drawn, "belongs_to": self._identity()}

    def restore(self, state: dict) -> None:
        """Go to a position that `state` gave. Raises E206 when data or order have changed."""
        ours, theirs = self._identity(), state["belongs_to"]
        for key in [key for key in ours if ours[key] != theirs.get(key)]:
            why = f"was {theirs.get(key)}, is {ours[key]}"
            fix = "resume with the data and config of the checkpoint, or start a new run"
            raise ExpertlyError("E206", f"data order ({key})", why, fix=fix)
        self._drawn = {index: state["drawn"][each.domain] for index, each in self._sets.items()}

    def _identity(self) -> dict:
        sets = self._sets.items()
        return {
            "seed": self._seed,
            "sequence_length": self._length,
            "tokens": {each.domain: each.digest for _, each in sets},  # the cause first
            "shares": {each.domain: self._weights[index] for index, each in sets},
        }

    def _draw(self) -> tuple[int, tuple[np.ndarray, ...]]:
        """The next row: the index of its domain and its arrays (seq,)."""
        index = self._next_domain()
        epoch, place = divmod(self._drawn[index], self._rows[index])
        if self._orders.get(index, (-1,))[0] != epoch:
            self._orders[index] = (epoch, self._permutation(index, epoch))
        row = self._sets[index].row(int(self._orders[index][1][place]), self._length)
        self._drawn[index] += 1
        return index, row

    def _next_domain(self) -> int:
        """Of the domains behind their share, the one whose next row is due first.

        Earliest deadline, not largest deficit: with many domains the latter may let one fall
        more than a row behind.
        """
        position = sum(self._drawn.values()) + 1
        behind = [at for at, share in self._weights.items() if share * position > self._drawn[at]]
        return min(behind, key=lambda at: (self._drawn[at] + 1) / self._weights[at])

    def _permutation(self, index: int, epoch: int) -> np.ndarray:
        """The order (rows,) of a domain's rows in one epoch."""
        name = hashlib.sha256(self._sets[index].domain.encode("utf-8")).digest()
        words = [self._seed, int.from_bytes(name[:8], "little"), epoch]
        # Sorted raw bits: numpy keeps those the same in every release, permutation() it does not.
        bits = np.random.PCG64(np.random.SeedSequence(words)).random_raw(self._rows[index])
        return np.argsort(bits, kind="stable")


def next_tokens(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    learnt: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each token (batch, seq) is to be followed by, -100 where nothing is asked.

    Nothing is at a row's end, where either token is padding, and where the next is not to be
    learnt or begins another text.
    """
    labels = input_ids.roll(-1, dims=1)
    if attention_mask is not None:
        mask = attention_mask.bool()
        labels = labels.where(mask & mask.roll(-1, dims=1), -100)
    if learnt is not None:
        labels = labels.where(learnt.roll(-1, dims=1), -100)
    if position_ids is not None:
        labels = labels.where(position_ids.roll(-1, dims=1) != 0, -100)
    labels[:, -1] = -100
    return labels


def batch_of(rows: Sequence[tuple[np.ndarray, ...]], domains: Sequence[int]) -> Batch:
    """Rows side by side; each is its tokens, and where examples are kept apart learnt, positions.

    Of the latter, columns at the end that hold padding alone are cut off.
    """
    ids, *apart = (torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True))
    if not apart:
        return Batch(ids.long(), torch.tensor(domains))
    learnt, places = apart
    used = int(places.amax(dim=0).nonzero().max()) + 1  # an example has two tokens at least
    parts = (learnt[:, :used], places[:, :used])
    return Batch(ids[:, :used].long(), torch.tensor(domains), None, *parts)


def _shares(sets: Mapping[int, Rows], weights: Mapping[str, float] | None) -> dict[int, float]:
    """Each domain's share of the rows; they sum to 1."""
    if weights is None:
        weights = {each.domain: each.size for each in sets.values()}
    for each in sets.values():
        if not weights.get(each.domain, 0.0) > 0:
            fix = "give every training source a weight above 0, or none of them"
            raise ExpertlyError("E202", f"domain {each.domain}", "has no weight", fix=fix)
    total = sum(weights[each.domain] for each in sets.values())
    return {index: weights[each.domain] / total for index, each in sets.items()}


def eval_batches(
    token_sets: Sequence[TokenSet], *, batch_size: int, sequence_length: int, eval_tokens: int
) -> list[Batch]:
    """The held-out tokens of each domain, at most `eval_tokens` of them, always the same rows.

    A batch holds one domain. The last row of a domain is padded, with attention_mask 0 there.
    Raises E303 when no domain has held-out tokens.
    """
    batches = []
    for index, each in enumerate(token_sets):
        rows, mask = _padded_rows(each.held_out[:eval_tokens], sequence_length)
        for part, part_mask in zip(rows.split(batch_size), mask.split(batch_size), strict=True):
            if len(part):
                batches.append(Batch(part, torch.full((len(part),), index), part_mask))
    if not batches:
        fix = "add a source with eval: true, or more documents"
        raise ExpertlyError("E303", "data.sources", "no document is held out", fix=fix)
    return batches


def _padded_rows(tokens: np.ndarray, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and their attention mask, both (rows, seq)."""
    rest = tokens.size % sequence_length
    # a row of one token predicts nothing; its mean loss would be 0 / 0
    used = tokens.size - 1 if rest == 1 else tokens.size
    rows = -(-used // sequence_length)
    ids = torch.zeros(rows * sequence_length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    ids[:used] = torch.from_numpy(tokens[:used].astype(np.int64))
    mask[:used] = 1
    return ids.view(rows, sequence_length), mask.view(rows, sequence_length)
