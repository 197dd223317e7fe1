"""In which format a checkpoint has its parts, as its config.json says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from expertly.plan.precision import QUANTISABLE, format_of
from expertly.plan.shape import PARTS

Config = Mapping[str, Any]
_METHODS = {"fp8": "fp8", "fbgemm_fp8": "fp8", "finegrained_fp8": "fp8", "mxfp4": "mxfp4"}


class Stored(NamedTuple):
    """Part -> the name of its format, and what a reader should know."""

    formats: dict[str, str]
    notes: tuple[str, ...]


def stored_as(config: Config) -> Stored:
    """In which format each part is: what the config says of types, over it of quantization.

    A quantization that is not read is not counted; a note says so.
    """
    said = config.get("dtype") or config.get("torch_dtype")
    plain = format_of(str(said).removeprefix("torch."))
    base = plain.name if plain else "bf16"
    formats = dict.fromkeys(PARTS, base)
    quantization = config.get("quantization_config")
    if not quantization:
        return Stored(formats, ())
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    name = _quantized(quantization) if isinstance(quantization, Mapping) else None
    if name is None:
        what = "without a method" if method is None else repr(str(method)[:40])
        note = f"quantization {what} is not read: counted as {base}"
        return Stored(formats, (note,))
    # MXFP4 as gpt-oss has it: the experts alone
    formats.update(dict.fromkeys(("experts",) if method == "mxfp4" else QUANTISABLE, name))
    return Stored(formats, ())


def _quantized(said: Config) -> str | None:
    """The name of the format that a quantization_config says; None for one that is not known."""
    method = said.get("quant_method")
    if method == "bitsandbytes":
        return "int4g64" if said.get("load_in_4bit") else "int8"
    if method == "compressed-tensors":
        return _compressed(said)
    if "bits" in said:  # GPTQ, AWQ and those who followed
        return _integers(said["bits"], said.get("group_size"))
    return _METHODS.get(str(method))


def _compressed(said: Config) -> str | None:
    """compressed-tensors: of the first group of modules, as a rule the only one."""
    groups = said.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    bits = weights.get("num_bits")
    if weights.get("type") != "float":
        return _integers(bits, weights.get("group_size"))
    if bits == 4 and weights.get("group_size") == 32:
        return "mxfp4"
    return "fp8" if bits == 8 else None


def _integers(bits: Any, group: Any) -> str | None:
    """Integers of so many bits with scales for groups of weights; None for no such numbers.

    Without a group, or with one of -1, a scale is for a whole row: so few that 128 says too much
    by 2 %.
    """
    if type(bits) not in (int, float) or not 1 <= bits <= 16:
        return None
    if group is not None and type(group) is not int:
        return None
    found = format_of(f"int{bits:g}" + (f"g{group}" if group and group > 0 else ""))
    return found.name if found else None
