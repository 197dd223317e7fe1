"""How alike experts still are: cosines to each other, and to the dense model they were made of.

Per matrix (gate, up, down), so that a scaled one counts as the same; 1 is equal. One dense matrix
is in memory at a time, of each model that experts come from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.adapter_files import base_marks
from expertly.models.attach import Attachment
from expertly.models.experts import expert_matrices
from expertly.models.shards import Shards
from expertly.receipts import RECEIPT, fingerprint, read

_LOST = (ExpertlyError, OSError, ValueError)
_DENSE = tuple(f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


class Origin(NamedTuple):
    """What the experts of an upcycled model were made of."""

    slices: int  # expert = copy x slices + slice
    layers: list[int]  # the decoder layers that have experts
    sources: list[Shards]
    whose: list[int]  # by copy, its source

    def parts(self, index: int, number: int, like: Tensor) -> list[Tensor]:
        """By expert, its part of a dense matrix of the index-th MoE layer: views."""
        name = _DENSE[number].format(self.layers[index])
        cut = [
            source.tensor(name).to(like.device).float().chunk(self.slices, dim=_cut(number))
            for source in self.sources
        ]
        return [part for source in self.whose for part in cut[source]]


class Divergence:
    """Measures the experts of a model that an attachment is on.

    folder: what the run goes on from, "" for nothing. An upcycled one names its dense model; what
    of that is no longer there is said, and left out.
    """

    def __init__(self, attachment: Attachment, folder: str, say: Callable[[str], None]):
        self._layers, self._say = attachment.layers, say
        self._slices = 1
        self._origin: Origin | None = None
        made = _made(Path(folder)) if folder else None
        if made is None:
            return
        try:
            self._slices = _slices_of(made, self._layers[0].num_experts)
            origin = _origin(made)
            _require_fit(origin, [expert_matrices(each.experts) for each in self._layers])
            self._origin = origin
        except _LOST as error:
            self._leave_out(error)

    @torch.no_grad()
    def measure(self) -> dict[str, list[float]]:
        """Per MoE layer the mean cosines: to_dense where it is known, and to_each_other."""
        try:
            found = [self._layer(index) for index in range(len(self._layers))]
        except _LOST as error:
            self._leave_out(error)
            found = [self._layer(index) for index in range(len(self._layers))]
        names = [name for name in ("to_dense", "to_each_other") if name in found[0]]
        return {name: [round(each[name], 6) for each in found] for name in names}

    def _leave_out(self, error: Exception) -> None:
        self._origin = None
        why = f"{error.what}: {error.why}" if isinstance(error, ExpertlyError) else str(error)
        self._say(f"divergence from the dense model is left out: {why}")

    def _layer(self, index: int) -> dict[str, float]:
        """The cosines of one layer, averaged over its matrices."""
        found: dict[str, list[float]] = {"to_dense": [], "to_each_other": []}
        for number, stack in enumerate(expert_matrices(self._layers[index].experts)):
            if len(stack) > self._slices:
                found["to_each_other"].append(to_each_other(stack, self._slices))
            if self._origin is not None:
                found["to_dense"].append(to_dense(stack, self._origin.parts(index, number, stack)))
        return {name: fmean(values) for name, values in found.items() if values}


def to_each_other(stack: Tensor, slices: int = 1) -> float:
    """The mean cosine of any two experts that hold the same slice, of which there must be two.

    stack: (experts, ...). Of n vectors of length 1, |their sum|^2 is n and twice all pairs.
    """
    members, pairs = len(stack) // slices, 0.0
    for first in range(slices):
        total = torch.zeros(stack.shape[1:], device=stack.device)
        lengths = 0.0
        for expert in stack[first::slices].unbind():
            length = _dot(expert, expert) ** 0.5
            if length:  # one of zeros is like no other
                total.add_(expert, alpha=1 / length)
                lengths += 1
        pairs += _dot(total, total) - lengths
    return pairs / (slices * members * (members - 1))


def to_dense(stack: Tensor, parts: Sequence[Tensor]) -> float:
    """The mean cosine of each expert of a stack (experts, ...) to its own part of a dense model."""
    squares = {id(part): _dot(part, part) for part in parts}  # copies of one part are one tensor
    total = 0.0
    for expert, part in zip(stack, parts, strict=True):
        square = _dot(expert, expert) * squares[id(part)]
        total += _dot(expert, part) / square**0.5 if square else 0.0
    return total / len(stack)


def _dot(a: Tensor, b: Tensor) -> float:
    """Rows in float32, their sum in float64: over a large matrix at once BLAS is off by percents"""
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def _made(folder: Path) -> dict[str, Any] | None:
    """What an upcycled folder's receipt says, inputs and changes together; None for another."""
    if not (folder / RECEIPT).is_file():
        return None
    try:
        receipt = read(folder)
    except ExpertlyError:  # the model itself was checked
        return None
    return {**receipt.inputs, **receipt.changed} if receipt.job == "upcycle" else None


def _slices_of(made: dict[str, Any], num_experts: int) -> int:
    slices = made.get("slices")
    if type(slices) is not int or slices < 1 or num_experts % slices:
        raise ValueError(f"the receipt says {slices!r} slices")
    return slices


def _origin(made: dict[str, Any]) -> Origin:
    """Raises for a dense model that is gone or no longer the same."""
    try:
        said = made["specialists"] or [made["dense"]] * made["copies"]
        known = [(Path(each["path"]), each["config"], each.get("weights")) for each in said]
        slices, layers = made["slices"], made["layers"]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the receipt is not as expected ({error!r})") from error
    paths = list(dict.fromkeys(path for path, *_ in known))
    marks: dict[Path, Any] = {}  # of each folder once, however many copies come from it
    for path, config, weights in known:
        if fingerprint(path / "config.json") != config:
            raise ValueError(f"{path}: its config.json is another than it was")
        if weights is not None:  # older receipts do not say
            marks[path] = marks.get(path) or base_marks(path)["weights"]
            if marks[path] != weights:
                raise ValueError(f"{path}: its weights are others than they were")
    whose = [paths.index(path) for path, *_ in known]
    return Origin(slices, layers, [Shards(path) for path in paths], whose)


def _require_fit(origin: Origin, layers: Sequence[Sequence[Tensor]]) -> None:
    """Raises ValueError where experts cannot be what the dense matrices were cut into."""
    if len(origin.layers) != len(layers):
        raise ValueError(f"{len(layers)} layers have experts, not {len(origin.layers)}")
    experts = len(origin.whose) * origin.slices
    for index, stacks in zip(origin.layers, layers, strict=True):
        for number, stack in enumerate(stacks):
            name, shape = _DENSE[number].format(index), list(stack.shape[1:])
            shape[_cut(number)] *= origin.slices
            whole = [name in each.names and list(each.entry(name).shape) for each in origin.sources]
            if len(stack) != experts or any(each != shape for each in whole):
                raise ValueError(f"{name} is not what the experts were made of")


def _cut(number: int) -> int:
    """The axis along which a dense matrix is cut: the rows of gate and up, the columns of down."""
    return 1 if number == len(_DENSE) - 1 else 0
