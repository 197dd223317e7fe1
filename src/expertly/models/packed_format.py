"""Packed checkpoints as config.json and headers describe them: compressed-tensors, pack-quantized.

A matrix X of (out, in) weights is X.weight_packed, int32 (out, in x bits / 32), lowest bits first;
X.weight_scale (out, in / group_size); X.weight_shape; and, with zero points, X.weight_zero_point,
int32 (out x bits / 32, in / group_size). Levels and zero points are stored without a sign.
Source: the package compressed-tensors 0.20. Needs no torch.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError
from expertly.models.files import TensorHeader

FORMAT, METHOD = "pack-quantized", "compressed-tensors"
PACKED, SCALE, ZERO, SHAPE = (
    f".weight_{part}" for part in ("packed", "scale", "zero_point", "shape")
)
PARTS = (PACKED, SCALE, SHAPE, ZERO)
_DTYPES = {
    PACKED: ("I32",),
    SCALE: ("F16", "BF16", "F32"),
    SHAPE: ("I32", "I64"),
    ZERO: ("I32",),
}
_ORDER = ".weight_g_idx"  # inputs in another order than the groups
_GROUP_SIZES = (32, 64, 128)  # that the kernels know
_AGAIN = "copy the folder again"
# one matrix of an expert, by the name of its module: the layer's experts, a number, which matrix
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(.+)")
_DOWN = re.compile(r"down|(w|fc)2$")  # in a module of its own; gates and ups lie in one


class Scheme(NamedTuple):
    """How a matrix is quantised."""

    bits: int
    group_size: int
    symmetric: bool


def read_packing(config: Mapping[str, Any], what: str) -> list[Scheme] | None:
    """The schemes that a config.json says its packed weights have; None: not packed like this.

    what: the folder, for errors. Raises E301 for words that mean nothing, E306 for a variety of
    the format that is not read.
    """
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return None
    groups = said.get("config_groups") or {}
    _require_words(said, groups, what)
    formats = {group.get("format") or said.get("format") for group in groups.values()}
    if formats != {FORMAT}:
        return None
    _refuse_more(said, what)
    return [_scheme(group, what) for group in groups.values()]


def check_packed(
    folder: Path, tensors: Sequence[TensorHeader], known: list[Scheme]
) -> dict[str, Scheme]:
    """The scheme of every packed weight, by its name without the part's.

    Raises E301 for parts that do not fit together, E306 for inputs in another order and for
    experts that are packed in part.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    packed = [name.removesuffix(PACKED) for name in by_name if name.endswith(PACKED)]
    if not packed:
        why = "config.json says packed weights, the files hold none"
        raise ExpertlyError("E301", str(folder), why, fix=_AGAIN)
    found = {}
    for name in packed:
        parts = {part: by_name.get(f"{name}{part}") for part in (PACKED, SCALE, SHAPE, ZERO)}
        if f"{name}{_ORDER}" in by_name:
            why = f"{name} has its inputs in another order (g_idx)"
            raise ExpertlyError("E306", str(folder), why, fix="quantise without reordering")
        scheme = _scheme_of(parts, known)
        if isinstance(scheme, str):
            raise ExpertlyError("E301", str(folder), f"{name}: {scheme}", fix=_AGAIN)
        found[name] = scheme
    _check_experts(folder, by_name, found)
    return found


def _check_experts(folder: Path, names: Iterable[str], found: Mapping[str, Scheme]) -> None:
    """Raises E306 for a layer whose experts are not all packed, or not all in the same way.

    They become two stacks: gates with ups, and downs. Each stack has one scheme.
    """
    dense = {n.removesuffix(".weight"): None for n in names if n.endswith(".weight")}
    layers: dict[str, dict[bool, tuple[str, Scheme | None]]] = {}
    for module, scheme in {**dense, **found}.items():
        part = _EXPERT.fullmatch(module)
        if part is None:
            continue
        stacks = layers.setdefault(part[1], {})
        first, usual = stacks.setdefault(bool(_DOWN.search(part[2])), (module, scheme))
        half = any((other is None) != (scheme is None) for _, other in stacks.values())
        if half or usual != scheme:
            how = "packed and dense" if half else "packed in more than one way"
            why = f"the experts {part[1]} are {how} ({module}, {first})"
            raise ExpertlyError("E306", str(folder), why, fix="open the original with bits")


def _require_words(said: Mapping[str, Any], groups: Any, what: str) -> None:
    """Raises E301 for config groups that are none, or formats that are no names."""
    wrong = "config_groups" if not isinstance(groups, dict) else None
    for name, group in groups.items() if wrong is None else ():
        weights = isinstance(group, dict) and isinstance(group.get("weights") or {}, dict)
        if not weights or not isinstance(group.get("format") or "", str):
            wrong = f"config_groups, {name[:40]!r}"
    if not isinstance(said.get("format") or "", str):
        wrong = "format"
    if wrong:
        why = f"config.json: {wrong} in quantization_config cannot be read"
        raise ExpertlyError("E301", what, why, fix=_AGAIN)


def _refuse_more(said: Mapping[str, Any], what: str) -> None:
    """Raises E306 for weights that were sparsified or rotated as well, which levels do not say."""
    sparsity, transform = said.get("sparsity_config"), said.get("transform_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    turned = any(transform.values()) if isinstance(transform, dict) else transform
    for key, more in (("sparsity_config", sparsity and not dense), ("transform_config", turned)):
        if more:
            why = f"config.json has a {key}, which is not read"
            raise ExpertlyError("E306", what, why, fix="quantise the model without it")


def _scheme(group: Mapping[str, Any], what: str) -> Scheme:
    """A config group's, if the kernels can run it; E306 if not."""
    said = group.get("weights") or {}
    whole = type(said.get("num_bits")) is int and type(said.get("group_size")) is int
    reads = (
        whole
        and said["num_bits"] in (4, 8)
        and said.get("type", "int") == "int"
        and said.get("strategy") == "group"
        and said["group_size"] in _GROUP_SIZES
        and isinstance(said.get("symmetric", True), bool)
        and not said.get("dynamic")
        and not group.get("input_activations")
        and not group.get("output_activations")
    )
    if not reads:
        keys = ("num_bits", "type", "strategy", "group_size")
        why = f"packed weights of {', '.join(f'{key} {said.get(key)!s:.40}' for key in keys)}"
        fix = "choose weights of 4 or 8 bits in groups of 32, 64 or 128"
        raise ExpertlyError("E306", what, f"{why}, which are not read", fix=fix)
    return Scheme(said["num_bits"], said["group_size"], said.get("symmetric", True))


def _scheme_of(parts: dict[str, TensorHeader | None], known: list[Scheme]) -> Scheme | str:
    """The scheme that the headers of one packed weight follow, or why they cannot be true."""
    found = {part: header for part, header in parts.items() if header is not None}
    for part in (SCALE, SHAPE):
        if part not in found:
            return f"its {part[1:]} is missing"
    for part, header in found.items():
        dims = 1 if part == SHAPE else 2
        if header.dtype not in _DTYPES[part] or len(header.shape) != dims or 0 in header.shape:
            return f"its {part[1:]} is {header.dtype} {list(header.shape)}"
    shapes = {part: header.shape for part, header in found.items()}
    for scheme in known:
        if shapes == _shapes(scheme, shapes):
            return scheme
    if ZERO not in shapes and not any(scheme.symmetric for scheme in known):
        return f"its {ZERO[1:]} is missing"
    said = ", ".join(f"{part[1:]} {list(shape)}" for part, shape in shapes.items())
    return f"{said} do not fit together, or not what config.json says"


def _shapes(scheme: Scheme, found: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that parts must have when as many rows and groups were found."""
    out, groups = found[PACKED][0], found[SCALE][-1]
    words = groups * scheme.group_size * scheme.bits // 32
    shapes = {PACKED: (out, words), SCALE: (out, groups), SHAPE: (2,)}
    if not scheme.symmetric:
        shapes[ZERO] = (-(-out * scheme.bits // 32), groups)
    return shapes
