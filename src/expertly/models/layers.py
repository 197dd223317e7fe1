"""Where a model keeps its experts and its routers, read from the family table."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import require_family, rule_of, sizes
from expertly.moe.policy import Policy


class MoeLayer(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the block, as in named_modules()
    num_experts: int
    block: Any  # the family's own modules, whose attributes only transformers types
    router: Any
    experts: Any


def moe_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The model's MoE layers, in order. Raises E306 for an unknown family, E305 for none at all."""
    config = model.config.to_dict()
    row, num_experts = require_family(config), sizes(config).num_experts
    found = [
        MoeLayer(name, num_experts, block, bare(getattr(block, row.router)), bare(block.experts))
        for name, block in model.named_modules()
        if hasattr(block, "experts")
        and hasattr(block, row.router)
        and not (row.unless and getattr(block, row.unless))
    ]
    if not found:
        why = "no MoE layer in it"
        raise ExpertlyError("E305", type(model).__name__, why, fix="open an MoE checkpoint")
    return found


def bare(module: Any) -> Any:
    """The family's own module inside what PEFT may have put around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def own_policy(config: Mapping[str, Any]) -> Policy:
    """The policy that a family's own code follows, so that attaching it changes nothing.

    config: the model's, as a dict. Raises E306 for one that says a rule we do not know, sound as it
    may be for transformers.
    """
    try:
        rule, options = rule_of(config)
    except ExpertlyError as error:
        if error.code != "E305":
            raise
        what, why = f"model_type {config['model_type']!r}", "its routing rule is not read"
        raise ExpertlyError(
            "E306", what, f"{why}: {error.why}", fix="name another model"
        ) from error
    return Policy(router=rule, top_k=sizes(config).top_k, options=options)


def selection_bias(block: nn.Module, path: str) -> Tensor:
    """The selection bias at a family's dotted path: (experts,), sharing the family's own storage.

    Ernie's is (1, experts).
    """
    return _bias_tensor(block, path).flatten()


def cast_bias(block: nn.Module, path: str, dtype: torch.dtype) -> None:
    """Give a block's selection bias another dtype; buffer or parameter, it stays the same one."""
    bias = _bias_tensor(block, path)
    bias.data = bias.data.to(dtype)


def _bias_tensor(block: nn.Module, path: str) -> Tensor:
    module, _, name = path.rpartition(".")
    return getattr(block.get_submodule(module), name)


def router_device(router: nn.Module) -> torch.device:
    """Where a router computes."""
    return next(router.parameters()).device


# --- Logits: each in float32, whatever the model runs in ---------------------------------------


def _linear(router: Any, x: Tensor) -> Tensor:
    bias = getattr(router, "bias", None)
    return F.linear(x.float(), router.weight.float(), None if bias is None else bias.float())


def _inner(name: str, router: Any, x: Tensor) -> Tensor:
    """Those of a linear layer inside the router."""
    return _linear(getattr(router, name), x)


def _multiplied(router: Any, x: Tensor) -> Tensor:
    return _linear(router, x) * router.output_multiplier


def _softcapped(router: Any, x: Tensor) -> Tensor:
    """Kept within +-cap by tanh, where the cap is not 0."""
    logits, cap = _linear(router, x), router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0 else logits


def _normed(router: Any, x: Tensor) -> Tensor:
    """Those of a normed and scaled input."""
    x = router.norm(x.float()) * router.scale.float() * router.scalar_root_size
    return _linear(router.proj, x)


# (router, its input (tokens, dim)) -> (tokens, experts)
LOGITS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": _linear,
    "multiplied": _multiplied,
    "softcapped": _softcapped,
    "normed": _normed,
    "gate": partial(_inner, "gate"),
    "wg": partial(_inner, "wg"),
    "classifier": partial(_inner, "classifier"),
}
