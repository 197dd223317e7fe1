"""What is in a model folder, read from config.json and the safetensors headers alone."""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError
from expertly.families import family_of, sizes
from expertly.folders import read_json, verify

_HEADER_LIMIT = 100 * 1024 * 1024  # bytes, safetensors' own
# the first pattern that a tensor's name matches says which part of the model it is
_PARTS = (
    ("shared experts", r"\.shared_experts?[._]|\.shared_mlp\."),
    ("experts", r"\.experts\.|\.(input|output)_linear\."),
    ("router", r"\.(gate|router)\.|e_score_correction_bias|\.moe_statics\."),
    ("embeddings", r"embed_tokens|\.wte\."),
    ("head", r"^lm_head\."),
    ("norms", r"norm"),
    ("attention", r"attn|attention"),
    ("dense layers", r"\.mlp\.|\.feed_forward\."),
)


class TensorHeader(NamedTuple):
    """One tensor as a safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model folder in numbers. bytes and parameters by part; active: per token."""

    family: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    layout: str  # per expert | fused | none
    dtypes: dict[str, int]  # parameters by dtype
    bytes: dict[str, int]
    parameters: dict[str, int]
    total: int
    active: int
    verified: bool  # a manifest was there, and agreed


def inspect_folder(folder: Path, *, hashes: bool = False) -> Inspection:
    """Read a model folder's config and headers; with `hashes` check every file's sha256 too.

    Raises E305 when it is no model folder, E301 and E302 for damaged files.
    """
    if not (folder / "config.json").is_file():
        fix = "name a Hugging Face model folder"
        raise ExpertlyError("E305", str(folder), "no config.json in it", fix=fix)
    config = read_json(folder / "config.json")
    verified = verify(folder, hashes=hashes)
    tensors = [t for file in sorted(folder.glob("*.safetensors")) for t in read_header(file)]
    if not tensors:
        raise ExpertlyError("E305", str(folder), "no tensors in it", fix="name a model folder")
    return _summary(config, tensors, verified)


def read_header(file: Path) -> Iterator[TensorHeader]:
    """The tensors that a safetensors file holds. Raises E301 for a header that lies."""

    def broken(why: str) -> ExpertlyError:
        return ExpertlyError("E301", str(file), why, fix="copy the file again")

    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > min(size, _HEADER_LIMIT):
            raise broken(f"header of {length} bytes in a file of {size}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise broken("its header is not JSON") from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= size - 8 - length:
            raise broken(f"{name} ends at byte {last} of {size - 8 - length}")
        yield TensorHeader(name, entry["dtype"], tuple(entry["shape"]), last - first)


def part_of(name: str) -> str:
    """Which part of a model a tensor belongs to, by its name."""
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")


def _summary(config: Mapping[str, Any], tensors: list[TensorHeader], verified: bool) -> Inspection:
    sizes_by, counts_by, dtypes = Counter[str](), Counter[str](), Counter[str]()
    for tensor in tensors:
        sizes_by[part_of(tensor.name)] += tensor.size
        counts_by[part_of(tensor.name)] += tensor.parameters
        dtypes[tensor.dtype] += tensor.parameters
    moe = sizes(config) if family_of(config) else None
    routed = [t.name for t in tensors if part_of(t.name) == "experts"]
    idle = 1 - moe.top_k / moe.num_experts if moe else 0
    total = sum(counts_by.values())
    return Inspection(
        family=config.get("model_type", "unknown"),
        layers=config.get("num_hidden_layers", 0),
        moe_layers=len({name.split(".experts.")[0] for name in routed}),
        experts=moe.num_experts if moe else 0,
        top_k=moe.top_k if moe else 0,
        layout=_layout(routed),
        dtypes=dict(dtypes.most_common()),
        bytes=dict(sizes_by.most_common()),
        parameters=dict(counts_by.most_common()),
        total=total,
        active=round(total - idle * counts_by["experts"]),
        verified=verified,
    )


def _layout(routed: list[str]) -> str:
    if not routed:
        return "none"
    return "per expert" if re.search(r"\.experts\.\d+\.", routed[0]) else "fused"
