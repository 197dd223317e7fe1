"""Low-rank adapters (LoRA) on a model, by PEFT: its layers, its names, its arithmetic for linears.

Experts are adapted as stacks (PEFT's target_parameters), gate_up and down together; our experts
function adds their terms (kernels/low_rank.py). Needs the package peft.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import family_of, require_family
from expertly.family_table import REFUSED
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.inspect import part_of
from expertly.models.layers import MoeLayer, moe_layers
from expertly.models.packing import experts_modules, is_packed

TARGETS = ("experts", "attention", "shared_experts", "router")
# Experts and routers are no linears. Shared experts are, but in some families PEFT takes the names
# of their linears for those of older models' experts.
_AS_PARAMETERS = ("experts", "router", "shared_experts")
_MIXER = re.compile(r"\.mixer\.[qkvo]_proj\.")  # NemotronH calls attention so
_INDEXER = "indexer"  # chooses the tokens that attention sees: no part of what it answers


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Which parts of a model get adapters, and of what rank (Hu et al. 2021, arXiv 2106.09685)."""

    r: int
    lora_alpha: float  # an adapter's answer is scaled by lora_alpha / r
    targets: Sequence[str] = ("experts", "attention")  # of TARGETS


class Wrapped(NamedTuple):
    """What of a part of a model has adapters."""

    part: str
    weights: int  # with an adapter; a layer's stacks of experts count one each
    parameters: int  # of the adapters


def add_adapter(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Put adapters beside a model's weights, in float32; nothing else learns afterwards.

    They begin at nothing: the model still computes what it did. Raises E202 for targets that match
    nothing, E207 without PEFT, E306 for experts that run in the family's own code, and for shared
    experts that are packed.
    """
    require_peft()
    if model.config.model_type in REFUSED:
        require_family(model.config.to_dict())
    layers = layers_of(model)
    names = {target: [*_names(model, layers, target)] for target in TARGETS}
    for target in spec.targets:
        if not names[target]:
            there = ", ".join(part for part, found in names.items() if found) or "nothing"
            why = f"{type(model).__name__} has no {target.replace('_', ' ')}"
            raise ExpertlyError("E202", "lora.targets", why, fix=f"choose of: {there}")
    if "shared_experts" in spec.targets and is_packed(model):
        why, fix = "packed ones take no adapters", "leave shared_experts out of lora.targets"
        raise ExpertlyError("E306", "shared experts", why, fix=fix)
    from expertly.models.peft_layers import inject, lora_config

    chosen = [
        (target, name) for target in TARGETS if target in spec.targets for name in names[target]
    ]
    config = lora_config(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=_short(
            [name for target, name in chosen if target not in _AS_PARAMETERS],
            [name for name, _ in model.named_modules()],
        ),
        target_parameters=_short(
            [name for target, name in chosen if target in _AS_PARAMETERS],
            [name for name, _ in model.named_parameters()] + names["experts"],
            least=2,
        ),
    )
    require_seam(model, layers, config.target_parameters or [])
    inject(model, layers, config)
    _require_all(wrapped(model), {target: names[target] for target in spec.targets})


def _require_all(rows: Sequence[Wrapped], asked: Mapping[str, Sequence[str]]) -> None:
    """Raises E306 when PEFT took the names for others."""
    for row in rows:
        count = len(asked.get(row.part, ()))
        if row.weights != count:
            why = f"PEFT puts adapters on {row.weights} weights, {count} were asked for"
            fix = "choose other lora.targets"
            raise ExpertlyError("E306", row.part.replace("_", " "), why, fix=fix)


def wrapped(model: PreTrainedModel) -> list[Wrapped]:
    """What of a model has adapters, by part; without any, a part has a row of zeros."""
    layers = layers_of(model)
    rows = {target: [0, 0] for target in TARGETS if any(_names(model, layers, target))}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            row = rows.setdefault(_part(name).replace(" ", "_"), [0, 0])
            row[0] += ".lora_A." in name
            row[1] += parameter.numel()
    return [Wrapped(part, *row) for part, row in rows.items()]


def require_peft() -> None:
    """Raises E207 when the package is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        fix = "pip install 'expertly[finetune]'"
        raise ExpertlyError("E207", "peft", "the package is not installed", fix=fix) from error


def layers_of(model: PreTrainedModel) -> list[MoeLayer]:
    """The MoE layers of a model, none of a dense one."""
    return moe_layers(model) if family_of(model.config.to_dict()) else []


def require_seam(
    model: PreTrainedModel, layers: Sequence[MoeLayer], targets: Sequence[str]
) -> None:
    """Raises E306 for adapters on experts that our experts function does not run."""
    ours = {id(experts) for experts in experts_modules(model).values()}
    asked = any(not target.endswith("weight") for target in targets)
    if asked and not all(id(layer.experts) in ours for layer in layers):
        what = f"model_type {model.config.model_type!r}"
        why = "its experts run in the family's own code, which adapters cannot reach"
        raise ExpertlyError("E306", what, why, fix="leave experts out of lora.targets")


def _names(model: PreTrainedModel, layers: Sequence[MoeLayer], target: str) -> Iterator[str]:
    """The weights of a part: names of linears, or of parameters for experts and routers."""
    if target == "experts":
        stacks = {id(layer.experts): _stacks(layer.experts) for layer in layers}
    elif target == "router":
        stacks = {id(layer.router): _matrices(layer.router) for layer in layers}
    else:
        leaf = ".weight" if target in _AS_PARAMETERS else ""
        yield from (f"{name}{leaf}" for name in _linears(model, target.replace("_", " ")))
        return
    for name, module in model.named_modules():
        for leaf in stacks.get(id(module), ()):
            yield f"{name}.{leaf}".replace(".base_layer", "")


def _stacks(experts: Any) -> list[str]:
    """gate_up and down, or up and down, also of packed experts."""
    if (packed := getattr(experts, "packed", None)) is not None:
        return ["gate_up_proj" if packed.gated else "up_proj", "down_proj"]
    known = ("gate_up_proj", "up_proj", "down_proj")
    return [name for name in known if name in experts._parameters]


def _matrices(router: nn.Module) -> list[str]:
    """The router's matrix; (experts, dim) of its own or of a linear in it."""
    return [name for name, p in router.named_parameters() if p.dim() == 2 and name == "weight"]


def _linears(model: PreTrainedModel, part: str) -> Iterator[str]:
    """Names of the decoder's linears in a part; not those of a tower for images or sound."""
    decoder = model.get_decoder()
    inside = {id(module) for module in (decoder if decoder is not None else model).modules()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | PackedLinear) or id(module) not in inside:
            continue
        name = name.replace(".base_layer", "")
        ours = {_INDEXER, "lora_A", "lora_B"} & {*name.split(".")}
        # a gate with one output is no matrix
        if _part(f"{name}.weight") == part and not ours and module.out_features > 1:
            yield name


def _part(name: str) -> str:
    """Which part of a model a parameter belongs to."""
    return "attention" if _MIXER.search(name) else part_of(name)


def _short(chosen: Sequence[str], known: Sequence[str], *, least: int = 1) -> list[str]:
    """The shortest ends of names, of so many parts at least, that mean the chosen and no others."""
    for parts in range(least, least + 3):
        ends = sorted({".".join(name.split(".")[-parts:]) for name in chosen})
        dotted = tuple(f".{end}" for end in ends)
        if not ends or {name for name in known if f".{name}".endswith(dotted)} == {*chosen}:
            return ends
    return sorted(chosen)


def merge_adapter(model: PreTrainedModel) -> None:
    """Fold a model's adapters into its weights, and take what was put around them away.

    Raises E301 when weights are not finite then.
    """
    from expertly.models.peft_layers import fold

    try:
        fold(model, layers_of(model))
    except ValueError as error:
        why = " ".join(str(error).split())[:160]
        raise ExpertlyError("E301", "the adapter", why, fix="train it again") from error
