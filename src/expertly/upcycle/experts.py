"""One expert's matrix from the dense feed-forward: a copy, a slice, with units anew, with noise.

Every draw hangs on (seed, layer, expert) alone, so the order of writing does not matter.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MATRICES = ("gate_proj", "up_proj", "down_proj")
_DOWN = 2


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to a copy of the dense feed-forward."""

    slices: int = 1
    share: float = 1.0  # of the feed-forward's output that the routed experts add
    drop: float = 0.0
    drop_apart: bool = False
    noise: float = 0.0
    seed: int = 0


class Place(NamedTuple):
    """Which expert's matrix: expert = copy x slices + slice; matrix: gate, up, down."""

    layer: int
    expert: int
    matrix: int


def expert_matrix(dense: Tensor, change: Change, place: Place) -> Tensor:
    """An expert's matrix of a dense one: gate and up (ff, dim), down (dim, ff); float32.

    Its slice of the units comes first, then units begin anew (Drop-Upcycling, ICLR 2025), then
    noise, then down is scaled: with weights that sum to 1 over k experts, slices of one copy each
    get 1 / slices of what a whole copy would (house decision 12).
    """
    down = place.matrix == _DOWN
    units = dense.T if down else dense
    width = len(units) // change.slices
    start = place.expert % change.slices * width
    units = units[start : start + width].to(torch.float32, copy=True)
    if change.drop:
        _renew(units, change, place)
    if change.noise:
        draws = torch.randn(units.shape, generator=_generator(change.seed, "noise", *place))
        units += change.noise * units.std() * draws
    if down:
        units *= change.slices * change.share
    return units.T if down else units


def _renew(units: Tensor, change: Change, place: Place) -> None:
    """Draw some of an expert's units (width, dim) anew, with the mean and spread of what goes.

    A unit is a row of gate and of up and a column of down: one set of them for all three.
    """
    whose = place if change.drop_apart else place[:2]
    order = torch.randperm(len(units), generator=_generator(change.seed, "units", *whose))
    gone = order[: round(change.drop * len(units))]
    if not len(gone):
        return
    before = units[gone]
    draws = torch.randn(before.shape, generator=_generator(change.seed, "drop", *place))
    units[gone] = before.mean() + before.std() * draws


def _generator(seed: int, what: str, *place: int) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, what, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
