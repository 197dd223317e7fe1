"""A model folder's files, checked before they are believed: config, index, safetensors headers.

A folder may come from anywhere, so whatever is in it becomes a value or an ExpertlyError. Needs
neither torch nor transformers; loads no weights.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError
from expertly.families import Family, family_of
from expertly.folders import checkpoints, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 1024 * 1024  # bytes, safetensors' own
_MAX_DIMS = 64  # torch's own
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# sizes that every family spells alike, with the largest that is not a typing error:
# transformers itself hangs on 2**63 layers
_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "vocab_size": 2**27,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
}
_LARGEST_MOE = 2**20


class _Lie(ValueError):
    """A header that contradicts itself or its file, in words for the user."""


class TensorHeader(NamedTuple):
    """One tensor as a safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes, in the file's data
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises E305 for a folder without, or one with impossible sizes."""
    file = folder / "config.json"
    if not file.is_file():
        why = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ExpertlyError("E305", str(folder), why, fix=_name_instead(folder))
    config = read_json(file)
    for why in _impossible(config):
        raise ExpertlyError("E305", str(file), why, fix="correct config.json")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, as transformers picks them.

    Raises E310 when only pickled weights are there, E305 for none, E301 for a shard that is
    missing or that the index names outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return list(_shards(folder))
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if found:
        return found
    pickled = sorted(file for kind in ("bin", "pt", "pth") for file in folder.glob(f"*.{kind}"))
    if pickled:
        fix = "convert it to safetensors in a sandbox"
        raise ExpertlyError("E310", str(pickled[0]), "pickled weights can run code", fix=fix)
    raise ExpertlyError("E305", str(folder), "no *.safetensors in it", fix="name a model folder")


def read_header(file: Path) -> list[TensorHeader]:
    """The tensors that a safetensors file holds. Raises E301 for a header that lies."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length + 8 > min(size, _HEADER_LIMIT):
                raise _Lie(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        tensors = [_tensor(name, said) for name, said in header.items() if name != "__metadata__"]
        _check_extents(tensors, 8 + length, size)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, _Lie) else f"a damaged header ({error})"
        raise ExpertlyError("E301", str(file), why[:200], fix="copy the file again") from error
    return tensors


def read_headers(folder: Path) -> list[TensorHeader]:
    """All tensors of a model folder. Raises what weight_files and read_header raise."""
    return [tensor for file in weight_files(folder) for tensor in read_header(file)]


def check_experts(folder: Path, tensors: Iterable[TensorHeader], num_experts: int) -> None:
    """Raises E301 when an expert that config.json promises is missing, or one is too many."""
    found: dict[tuple[str, str], set[int]] = {}
    for tensor in tensors:
        if part := re.fullmatch(r"(.+\.experts)\.(\d{1,9})\.(.+)", tensor.name):
            found.setdefault((part[1], part[3]), set()).add(int(part[2]))
    for (layer, weight), experts in found.items():
        wrong = sorted(experts ^ set(range(num_experts)))
        if wrong:
            lost = wrong[0] < num_experts
            said = "is missing" if lost else f"is there, config.json says {num_experts} experts"
            why = f"{layer}.{wrong[0]}.{weight} {said}"
            raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")


def _name_instead(folder: Path) -> str:
    """What to do about a folder without a model: download it, or name the one that was meant."""
    name = folder.as_posix()
    if not folder.parent.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return f"hf download {name} --local-dir DIR, then name DIR"
    saved = [path for path in checkpoints(folder) if (path / "config.json").is_file()]
    if saved:
        return f"name {saved[-1]}"
    return "name a Hugging Face model folder"


def _impossible(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a config's sizes, each with what is allowed."""
    if not isinstance(config.get("model_type", ""), str):
        yield "model_type is not a name"
        return
    for key, largest in _LARGEST.items():
        if config.get(key) is not None:
            yield from _not_whole(config, key, 1, largest)
    if row := family_of(config):
        yield from _impossible_experts(config, row)


def _impossible_experts(config: dict[str, Any], row: Family) -> Iterator[str]:
    """What is wrong with the sizes that the family's row names."""
    spelt = next((key for key in row.num_experts if key in config), row.num_experts[0])
    for key in (spelt, row.top_k, row.expert_width):
        yield from _not_whole(config, key, 1, _LARGEST_MOE)
    for key in filter(None, (row.shared_experts, row.first_dense)):
        yield from _not_whole(config, key, 0, _LARGEST_MOE)
    if row.sparse_step is not None and row.sparse_step in config:
        yield from _not_whole(config, row.sparse_step, 1, _LARGEST_MOE)
    if config[row.top_k] > config[spelt]:
        yield f"{row.top_k} is {config[row.top_k]}, but there are {config[spelt]} experts"


def _not_whole(config: dict[str, Any], key: str, least: int, largest: int) -> Iterator[str]:
    value = config.get(key)
    if type(value) is not int or not least <= value <= largest:
        said = f"is {repr(value)[:40]}" if key in config else "is missing"
        yield f"{key} {said}, expected a whole number from {least} to {largest}"


def _shards(folder: Path) -> Iterator[Path]:
    listed = read_json(folder / INDEX).get("weight_map")
    names = listed.values() if isinstance(listed, dict) else [None]
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        why = "is not a list of this folder's shards"
        raise ExpertlyError("E301", str(folder / INDEX), why, fix="copy the file again")
    for name in sorted(set(names)):
        if not (folder / name).is_file():
            raise ExpertlyError("E301", str(folder / name), "is missing", fix="copy it again")
        yield folder / name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Lie("a name is there twice")
    return made


def _tensor(name: str, said: dict[str, Any]) -> TensorHeader:
    """One entry of a header; a _Lie when it contradicts itself."""
    dtype, shape, (start, end) = said["dtype"], said["shape"], said["data_offsets"]
    whole = [*shape, start, end]
    if any(type(number) is not int or number < 0 for number in whole) or len(shape) > _MAX_DIMS:
        raise _Lie(f"{name} has an impossible shape or place")
    if dtype not in _BITS:
        raise _Lie(f"{name} has the unknown dtype {str(dtype)[:20]}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
        raise _Lie(f"{name} has {end - start} bytes, which is not its shape's size")
    return TensorHeader(name, dtype, tuple(shape), start, end)


def _check_extents(tensors: list[TensorHeader], data: int, size: int) -> None:
    """Tensors lie side by side from the first byte of data to the file's last."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))
    end = ordered[-1].end if ordered else 0
    if data + end != size:
        raise _Lie(f"{size} of {data + end} bytes")
    if ordered and ordered[0].start != 0:
        raise _Lie(f"a hole before {ordered[0].name}")
    for one, other in pairwise(ordered):
        if one.end != other.start:
            raise _Lie(f"{one.name} and {other.name} do not lie side by side")
