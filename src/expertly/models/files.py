"""A model folder's weight files, checked before they are believed: index, safetensors headers.

A folder may come from anywhere, so whatever is in it becomes a value or an ExpertlyError. Second
step of opening a folder, after its config.json; needs neither torch nor transformers and loads no
weights.
"""

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError
from expertly.families import family_of, num_layers, sizes
from expertly.folders import MANIFEST, read_json, verify

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"  # with it, peft would load another folder's weights
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".metadata")  # the last: torch's DCP
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
# Routed experts by their names on disk. Granite's and Step's are linear layers of the block itself;
# Laguna keeps the router's bias among them.
EXPERTS = re.compile(
    r"\.experts\.(?!e_score_correction_bias)"
    r"|(?<=\.block_sparse_moe)\.(?:in|out)put_linear\."
    r"|(?<=\.moe)\.(?:gate|up|down)_proj\."
)
# the number of a layer in a name: Switch's are blocks of an encoder and of a decoder
_LAYER = re.compile(r"(?:\.layers|coder\.block)\.(\d{1,9})\.")
# a router's weight by its name on disk, and the MoE block that it is in
_ROUTER = re.compile(r"(.+?)\.(?:gate|router)\.(?:\w+\.)?weight")


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

    @property
    def weights(self) -> int:
        """How many weights it may hold at most: whole numbers may be packed ones, of 2 bits."""
        return self.parameters if "F" in self.dtype else 4 * self.size


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, as transformers picks them.

    Raises E310 when only pickled weights are there, E305 for none, E301 for a shard that is
    missing or that the index names outside the folder.
    """
    if (folder / _ADAPTER).is_file():
        fix = "merge the adapter into its base model first"
        raise ExpertlyError("E305", str(folder), f"{_ADAPTER}: no whole model", fix=fix)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return list(_shards(folder))
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if found:
        return found
    pickled = sorted(path for path in folder.glob("*") if path.name.endswith(_PICKLED))
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
    """All tensors of a model folder. Raises what weight_files and read_header raise.

    E301 too when two shards hold the same tensor: which one is meant?
    """
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file)]
    name, times = max(Counter(t.name for t in tensors).items(), key=itemgetter(1), default=("", 0))
    if times > 1:
        why = f"{name} is in {times} of its files"
        raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")
    return tensors


def check_manifest(folder: Path, *, hashes: bool) -> bool:
    """Whether there is a manifest; then it agrees, and lists config.json and all weights.

    Raises what folders.verify does, and E301 for a file that it does not list.
    """
    if not verify(folder, hashes=hashes):
        return False
    listed = read_json(folder / MANIFEST)["files"]
    for file in (folder / "config.json", *weight_files(folder)):
        if file.name not in listed:
            why = f"is not in the folder's {MANIFEST}"
            raise ExpertlyError("E301", str(file), why, fix="copy the folder again")
    return True


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, by its name; None: to none."""
    part = _LAYER.search(name)
    return int(part[1]) if part else None


def check_layers(folder: Path, config: Mapping[str, Any], tensors: Sequence[TensorHeader]) -> None:
    """Raises E301 when weights are not there that config.json promises: layers, experts, routers.

    It goes by names, so it costs nothing; every name and shape is compared when weights load.
    """
    found = [layer for tensor in tensors if (layer := layer_of(tensor.name)) is not None]
    said = num_layers(config)
    if found and said > max(found) + 1:
        why = f"config.json says {said} layers, the weights hold {max(found) + 1}"
        raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")
    if row := family_of(config):
        names = {tensor.name for tensor in tensors}
        _check_experts(folder, names, sizes(config).num_experts)
        _check_routers(folder, names, row.router)


def _check_experts(folder: Path, names: Iterable[str], num_experts: int) -> None:
    """Raises E301 when an expert that config.json promises is missing, or one is too many."""
    found: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if part := re.fullmatch(r"(.+\.experts)\.(\d{1,9})\.(.+)", name):
            found.setdefault((part[1], part[3]), set()).add(int(part[2]))
    for (layer, weight), experts in sorted(found.items()):
        wrong = sorted(experts ^ set(range(num_experts)))
        if wrong:
            lost = wrong[0] < num_experts
            said = "is missing" if lost else f"is there, config.json says {num_experts} experts"
            why = f"{layer}.{wrong[0]}.{weight} {said}"
            raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")


def _check_routers(folder: Path, names: Collection[str], router: str) -> None:
    """Raises E301 for experts without a router: stock loaders would make a random one."""
    routed_to = [name for name in names if ".shared_" not in name]
    blocks = {name[: part.start()] for name in routed_to if (part := EXPERTS.search(name))}
    routed = {part[1] for name in names if (part := _ROUTER.match(name))}
    for block in sorted(blocks - routed):
        why = f"the router {block}.{router}.weight is missing"
        raise ExpertlyError("E301", str(folder), why, fix="copy the folder again")


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
