"""What is in a model folder, read from config.json and the safetensors headers alone."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertly.families import REFUSED, family_of, num_layers, require_family, sizes
from expertly.models.configs import read_config
from expertly.models.files import EXPERTS, TensorHeader, check_layers, check_manifest, read_headers
from expertly.models.packed_format import PACKED, PARTS, Scheme, check_packed, read_packing

# the first pattern that a tensor's name matches says which part of the model it is
_PARTS = (
    ("shared experts", r"\.shared?_(experts?[._]|mlp\.)"),
    ("experts", EXPERTS.pattern),
    ("router", r"\.(gate|router)\.|e_score_correction_bias|(router|expert)_bias$|\.moe_statics\."),
    ("embeddings", r"embed_tokens|\.wte\.|^shared\."),
    ("head", r"^lm_head\."),
    ("norms", r"norm"),
    ("attention", r"attn|[aA]ttention"),
    ("dense layers", r"\.mlp\.|\.feed_forward\.|\.block_sparse_moe\."),
)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model folder in numbers. bytes and parameters by part; active: per token."""

    family: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    layout: str  # per expert | fused | none
    format: str  # dense, or how its weights are quantised
    dtypes: dict[str, int]  # parameters by dtype; int4, int8: packed, whatever they lie in
    bytes: dict[str, int]
    parameters: dict[str, int]
    total: int
    active: int
    verified: bool  # a manifest was there, and agreed


def inspect_folder(folder: Path, *, hashes: bool = False) -> Inspection:
    """Read a model folder's config and headers; with `hashes` check every file's sha256 too.

    Raises E305 when it is no model folder, E306 for an MoE of no family that is read, E310 for
    pickled weights, E301 and E302 for damaged files.
    """
    config = read_config(folder)
    if config["model_type"] in REFUSED:
        require_family(config)
    verified = check_manifest(folder, hashes=hashes)
    tensors = read_headers(folder)
    known = read_packing(config, str(folder))
    packed = check_packed(folder, tensors, known) if known else {}
    check_layers(folder, config, tensors)
    return _summary(config, tensors, verified, packed)


def part_of(name: str) -> str:
    """Which part of a model a tensor belongs to, by its name."""
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")


def _summary(
    config: Mapping[str, Any],
    tensors: list[TensorHeader],
    verified: bool,
    packed: Mapping[str, Scheme],
) -> Inspection:
    sizes_by, counts_by, dtypes = Counter[str](), Counter[str](), Counter[str]()
    for tensor in tensors:
        sizes_by[part_of(tensor.name)] += tensor.size
        count, dtype = _weights(tensor, packed)
        counts_by[part_of(tensor.name)] += count
        dtypes[dtype] += count
    routed = [t.name for t in tensors if part_of(t.name) == "experts"]
    if routed and family_of(config) is None:
        require_family(config)
    # a dense twin may be of an MoE's own class (DeepSeek-V3), and states experts it does not have
    moe = sizes(config) if routed else None
    idle = 1 - moe.top_k / moe.num_experts if moe else 0
    total = sum(counts_by.values())
    return Inspection(
        family=config.get("model_type", "unknown"),
        layers=num_layers(config),
        moe_layers=len({EXPERTS.split(name)[0] for name in routed}),
        experts=moe.num_experts if moe else 0,
        top_k=moe.top_k if moe else 0,
        layout=_layout(routed),
        format=_format(config, packed),
        dtypes={dtype: count for dtype, count in dtypes.most_common() if count},
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


def _weights(tensor: TensorHeader, packed: Mapping[str, Scheme]) -> tuple[int, str]:
    """How many parameters a tensor holds and as what; scales and the like are no parameters."""
    name, _, part = tensor.name.rpartition(".")
    scheme = packed.get(name)
    if scheme is None or f".{part}" not in PARTS:
        return tensor.parameters, tensor.dtype
    count = tensor.parameters * 32 // scheme.bits if f".{part}" == PACKED else 0
    return count, f"int{scheme.bits}"


def _format(config: Mapping[str, Any], packed: Mapping[str, Scheme]) -> str:
    """How the weights are quantised, and which parts of the model are, as the files have it."""
    said = config.get("quantization_config")
    if not packed:
        return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else "dense"
    parts: dict[Scheme, dict[str, None]] = {}
    for name, scheme in packed.items():
        parts.setdefault(scheme, {})[part_of(f"{name}.weight")] = None
    return "; ".join(
        f"{scheme.bits} bits in groups of {scheme.group_size}"
        f"{'' if scheme.symmetric else ' with zero points'}: {', '.join(names)}"
        for scheme, names in sorted(parts.items(), key=lambda item: -len(item[1]))
    )
