"""Packed checkpoints as tensors: read one at a time, each as a record. See packed_format.py."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.models.files import weight_files
from expertly.models.packed_format import PACKED, SCALE, SHAPE, ZERO, Scheme
from expertly.models.records import Record, join_record, seen_as

_AGAIN = "copy the folder again"


@contextmanager
def stored_tensors(folder: Path, schemes: Mapping[str, Scheme]) -> Iterator[dict[str, Any]]:
    """A folder's tensors by name, each read when it is sliced; packed ones as records.

    schemes: of the packed ones, as check_packed found them.
    The record of X is called X.weight, as the weight itself would be. Files are read, not mapped:
    so their pages count in nobody's memory.
    """
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in weight_files(folder):
            opened = stack.enter_context(_open(file))
            found.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118
        for name, scheme in schemes.items():
            parts = (found.pop(f"{name}{part}", None) for part in (PACKED, SCALE, SHAPE, ZERO))
            found[f"{name}.weight"] = _Stored(f"{folder}: {name}", scheme, *parts)
        yield found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ExpertlyError("E301", str(file), str(error)[:200], fix="copy it again") from error


class _Parts(NamedTuple):
    """The tensors of one packed weight; anything that gives them when it is sliced."""

    what: str  # folder and name, for errors
    scheme: Scheme
    packed: Any
    scale: Any
    shape: Any
    zero: Any


class _Stored(_Parts):
    """One packed weight on disk, in the shape of a tensor that is still to be read."""

    def __getitem__(self, key: Any) -> Any:
        return _AsItIs(self._read())

    def _read(self) -> Tensor:
        """The record (out, bytes). Raises E301 for contents that contradict the headers."""
        bits, group_size, _ = self.scheme
        levels, scales, said = self.packed[...], self.scale[...], self.shape[...].tolist()
        held = [len(scales), scales.shape[1] * group_size]
        if said != held:
            raise self._wrong(f"weight_shape says {said}, its parts hold {held}")
        if not bool(scales.isfinite().all()):
            raise self._wrong(f"{int((~scales.isfinite()).sum())} scales are NaN or infinite")
        halves = scales.to(torch.float16)
        if not bool(halves.isfinite().all()):
            raise self._wrong("scales too large for float16")
        if lost := int(((halves == 0) & (scales != 0)).sum()):
            raise self._wrong(f"{lost} scales too small for float16")
        zeros = None if self.zero is None else unpack_zeros(self.zero[...], held[0], bits)
        return join_record(Record(seen_as(levels, torch.uint8), halves, zeros, bits, group_size))

    def _wrong(self, why: str) -> ExpertlyError:
        return ExpertlyError("E301", self.what, why, fix=_AGAIN)


class _AsItIs(NamedTuple):
    """A tensor that transformers is about to cast, and must not."""

    tensor: Tensor

    def to(self, **kwargs: Any) -> Tensor:
        return self.tensor


def unpack_zeros(packed: Tensor, out: int, bits: int) -> Tensor:
    """(out x bits / 32, groups) int32 to zero points (out, groups) uint8."""
    points = seen_as(packed.T, torch.uint8)
    if bits == 4:
        points = torch.stack([points & 15, points >> 4], dim=-1).flatten(-2)
    return points[:, :out].T.contiguous()


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """unpack_zeros's inverse."""
    per_word = 32 // bits
    points = torch.nn.functional.pad(zeros.T, (0, -zeros.shape[0] % per_word))
    if bits == 4:
        points = points[:, ::2] | points[:, 1::2] << 4
    return seen_as(points, torch.int32).T.contiguous()
