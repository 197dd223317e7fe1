"""Which weights of a model are packed, and the modules that hold them then.

Packed are the stacks of experts, the linears of attention, dense and shared feed-forwards, and
the head. Routers, norms, embeddings and gates with one output stay as they are.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import family_of, require_family
from expertly.family_table import REFUSED
from expertly.kernels.packed import GROUP_SIZES, PackedWeight
from expertly.kernels.packed_experts import PackedExperts, replace_experts, split_gate
from expertly.kernels.packed_linear import PackedLinear
from expertly.models.inspect import part_of
from expertly.models.layers import moe_layers

STACKS = ("gate_up_proj", "up_proj", "down_proj")
BITS = (4, 8, 16)
HEAD_BITS = 8  # the head decides between tokens whose logits are close
_PARTS = ("attention", "dense layers", "shared experts")
# what stands in attention's place in hybrids: Mamba's, convolutions', and NemotronH's for all
_MIXER = re.compile(r"\.(mamba|mixer|conv)\.(in|out|q|k|v|o)_proj$")
_INDEXER = "indexer"  # chooses the tokens that attention sees; small, and exact for that


class Precision(NamedTuple):
    """How a weight is packed."""

    bits: int
    group_size: int  # 0 at 16 bits


def require_precision(bits: int | None, group_size: int | None) -> Precision | None:
    """What bits= and group_size= of open_model say, groups of 32 where they say nothing.

    None without bits. Raises E202 for others than there are.
    """
    group_size = 32 if group_size is None else group_size
    if bits is not None and not _is_one_of(bits, BITS):
        fix = "choose 4, 8 or 16"
        raise ExpertlyError("E202", "bits", f"weights have no {bits!r} bits here", fix=fix)
    if not _is_one_of(group_size, GROUP_SIZES):
        fix = f"choose one of {', '.join(map(str, GROUP_SIZES))}"
        raise ExpertlyError("E202", "group_size", f"no groups of {group_size!r} weights", fix=fix)
    return Precision(bits, 0 if bits == 16 else group_size) if bits is not None else None


def _is_one_of(number: object, known: tuple[int, ...]) -> bool:
    return type(number) is int and number in known  # 4.0 is in (4, 8) too


def require_seam(config: Mapping[str, Any]) -> None:
    """Raises E306 for an MoE that is not read: its experts cannot be packed."""
    if config["model_type"] in REFUSED:
        require_family(config)


def plan_packing(model: PreTrainedModel, precision: Precision) -> dict[str, Precision]:
    """The parameters to pack, by name, and how; the model may be on the meta device.

    Raises E306 for experts that our function does not run, E202 with the tensor's name for a width
    that groups do not divide.
    """
    _require_stacks(model)
    plan = {f"{name}.weight": precision for name in _linears(model)}
    for name, experts in experts_modules(model).items():
        plan.update({f"{name}.{stack}": precision for stack in STACKS if hasattr(experts, stack)})
    if head := head_name(model):
        bits = max(precision.bits, HEAD_BITS)
        plan[f"{head}.weight"] = precision._replace(bits=bits)
    for name, asked in plan.items():
        _require_width(model, name, asked)
    return plan


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """The modules whose forward is transformers' seam for experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")
    }


def head_name(model: PreTrainedModel) -> str | None:
    """The name of the linear that makes the logits; None where it is no linear, or kept float32."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear | PackedLinear):
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    return None if _keeps(model, name) else name


def say_tied(config: PretrainedConfig, *, tied: bool) -> None:
    """Write into a config, in place, whether the head is the embedding."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "tie_word_embeddings") or part is config:
            part.tie_word_embeddings = tied


def is_packed(model: nn.Module) -> bool:
    """Whether any of its weights are packed."""
    return any(isinstance(module, PackedLinear | PackedExperts) for module in model.modules())


def install_linear(model: PreTrainedModel, path: str, weight: PackedWeight) -> None:
    """Put a packed weight in the place of a linear."""
    linear: Any = model.get_submodule(path)
    model.set_submodule(path, PackedLinear(weight, linear.bias))


def install_experts(experts: Any, packed: PackedExperts) -> None:
    """Put packed stacks, and the module's biases as they are now, in the place of its parameters.

    The module keeps its class, and so its gate and the seam.
    """
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    if experts.has_bias:
        biases = split_gate(experts, getattr(experts, f"{up}_bias"))
        for name, bias in {**biases, "down": experts.down_proj_bias}.items():
            packed.write_bias(name, bias)
    replace_experts(experts, packed)


def _linears(model: PreTrainedModel) -> Iterator[str]:
    """Names of the decoder's linears that are packed; not those of a tower for images or sound."""
    decoder = model.get_decoder()
    inside = {id(module) for module in (decoder if decoder is not None else model).modules()}
    routers = [layer.router for layer in moe_layers(model)] if _is_moe(model) else []
    never = {id(part) for router in routers for part in router.modules()}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or id(module) not in inside or id(module) in never:
            continue
        if module.out_features > 1 and _is_dense(name) and not _keeps(model, name):
            yield name


def _is_dense(name: str) -> bool:
    """Whether a linear is part of attention, or what stands in its place, or of a feed-forward."""
    known = part_of(f"{name}.weight") in _PARTS or _MIXER.search(name)
    return bool(known) and _INDEXER not in name.split(".")


def _keeps(model: PreTrainedModel, name: str) -> bool:
    """Whether the family keeps a module in float32, whatever the rest is in."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return bool(kept & set(name.split(".")))


def _is_moe(model: PreTrainedModel) -> bool:
    return family_of(model.config.to_dict()) is not None


def _require_stacks(model: PreTrainedModel) -> None:
    """Raises E306 when an MoE layer's experts are no stack behind the seam."""
    if not _is_moe(model):
        return
    packable = {id(experts) for experts in experts_modules(model).values()}
    if not all(id(layer.experts) in packable for layer in moe_layers(model)):
        what = f"model_type {model.config.model_type!r}"
        why = "its experts run in the family's own code, which packed weights cannot replace"
        raise ExpertlyError("E306", what, why, fix="open it without bits")


def _require_width(model: PreTrainedModel, name: str, precision: Precision) -> None:
    """Raises E202 when the groups do not divide a weight's input width."""
    path, _, leaf = name.rpartition(".")
    module, weight = model.get_submodule(path), model.get_parameter(name)
    transposed = leaf != "weight" and module.is_transposed
    width = weight.shape[-2 if transposed else -1]
    if precision.bits < 16 and width % precision.group_size:
        why = f"its input width of {width} does not divide into groups of {precision.group_size}"
        fix = "choose a group_size that divides it, or bits=16"
        raise ExpertlyError("E202", name, why, fix=fix)
