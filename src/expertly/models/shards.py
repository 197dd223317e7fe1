"""The tensors of a model folder one at a time: read without a mapping, written as they come.

safetensors maps a whole file, and its writer wants all of a file at once. Converting a model that
does not fit needs neither: headers tell where each tensor lies, and where each will.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.folders import write_json
from expertly.models.files import (
    INDEX,
    WEIGHTS,
    TensorHeader,
    read_header,
    read_headers,
    weight_files,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST = 5 * 10**9  # bytes of a file
_BLOCK = 2**24  # numbers of a tensor in memory at once, where all of it is not wanted


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """The tensors of a model folder by name; each read has memory of its own.

    Raises E301, E305, E310 for weight files that cannot be believed, E306 for numbers that are no
    plain floats: quantised ones.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._where: dict[str, tuple[Path, int, TensorHeader]] = {}
        read_headers(folder)  # each tensor is there once
        for file in weight_files(folder):
            headers = read_header(file)
            data = file.stat().st_size - max((header.end for header in headers), default=0)
            for header in headers:
                if header.dtype not in _DTYPES:
                    why = f"{header.name} is {header.dtype}, not a plain float"
                    fix = "name the original, unquantised model"
                    raise ExpertlyError("E306", str(folder), why, fix=fix)
                self._where[header.name] = (file, data, header)

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in the files' order."""
        return [*self._where]

    def entry(self, name: str) -> Entry:
        """A tensor's dtype and shape."""
        header = self._where[name][2]
        return Entry(name, _DTYPES[header.dtype], header.shape)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self.entry(name)
        return self._read(name, 0, entry.nbytes).view(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop, which may lie beyond the end, of a matrix: (stop - start, ...)."""
        entry = self.entry(name)
        stop = min(stop, entry.shape[0])
        each = entry.nbytes // entry.shape[0]
        return self._read(name, start * each, stop * each).view(stop - start, *entry.shape[1:])

    def gather(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at some indices, of any shape: (*indices.shape, ...)."""
        wanted, places = indices.unique(return_inverse=True)
        found = [self.rows(name, index, index + 1) for index in wanted.tolist()]
        return torch.cat(found)[places]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in order, in parts that hang on its shape alone."""
        shape = self.entry(name).shape
        if math.prod(shape) <= _BLOCK:
            yield self.tensor(name)
            return
        step = max(1, _BLOCK // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield self.rows(name, start, start + step)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """The bytes start to stop of a tensor's data as a flat tensor of its dtype."""
        file, data, header = self._where[name]
        held, got = bytearray(stop - start), -1
        with suppress(OSError), file.open("rb") as stream:
            stream.seek(data + header.start + start)
            got = stream.readinto(held)
        if got != len(held):
            why = f"{header.name} cannot be read"
            raise ExpertlyError("E301", str(file), why, fix="copy the file again")
        dtype = _DTYPES[header.dtype]
        return torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)


class Average:
    """Several models' tensors, averaged: of folders with the same names and shapes."""

    def __init__(self, models: Sequence[Shards]):
        self._models = models

    def entry(self, name: str) -> Entry:
        """A tensor's shape, and the least dtype that holds the numbers of every model."""
        entries = [model.entry(name) for model in self._models]
        dtype = reduce(torch.promote_types, (entry.dtype for entry in entries))
        return entries[0]._replace(dtype=dtype)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in float32."""
        return _mean([model.tensor(name) for model in self._models])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix, in float32."""
        return _mean([model.rows(name, start, stop) for model in self._models])

    def gather(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at some indices, in float32."""
        return _mean([model.gather(name, indices) for model in self._models])

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in order, in parts, in float32."""
        yield from map(_mean, zip(*(model.blocks(name) for model in self._models), strict=True))


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum((tensor.float() for tensor in tensors[1:]), tensors[0].float()) / len(tensors)


def write_shards(
    folder: Path, entries: Sequence[Entry], values: Iterable[Iterable[Tensor]]
) -> None:
    """Write tensors into safetensors files of at most 5 GB, with an index where there are several.

    values: for each entry its numbers in order, in as many parts as the caller likes; one part is
    in memory at a time.
    """
    groups, stream = _groups(entries), iter(values)
    names = [WEIGHTS]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, group in zip(names, groups, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(group))
            for entry in group:
                _write(file, entry, next(stream))
    if len(groups) > 1:
        where = {
            each.name: name for name, group in zip(names, groups, strict=True) for each in group
        }
        size = sum(entry.nbytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries of each file, in order."""
    groups: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if groups[-1] and held + entry.nbytes > _LARGEST:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.nbytes
    return groups


def _header(entries: Sequence[Entry]) -> bytes:
    """A safetensors header, its length first, padded to whole words."""
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        offsets = [start, end]
        said[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        start = end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, entry: Entry, parts: Iterable[Tensor]) -> None:
    """The numbers of one tensor; ValueError when they are not what the header says."""
    written = 0
    for part in parts:
        if part.dtype != entry.dtype:
            raise ValueError(f"{entry.name}: {part.dtype} in a tensor of {entry.dtype}")
        flat = part.contiguous().reshape(-1)
        written += file.write(flat.view(torch.uint8).numpy().data)
    if written != entry.nbytes:
        raise ValueError(f"{entry.name}: {written} of {entry.nbytes} bytes")
