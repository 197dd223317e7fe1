"""Where a model keeps its experts and its routers, read from the family table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import require_family, rule_options, sizes
from expertly.moe.policy import Policy


class MoeLayer(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the block, as in named_modules()
    num_experts: int
    router: Any  # the family's own modules, whose attributes only transformers types
    experts: Any


def moe_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The model's MoE layers, in order. Raises E306 for an unknown family, E305 for none at all."""
    config = model.config.to_dict()
    row, num_experts = require_family(config), sizes(config).num_experts
    found = [
        MoeLayer(name, num_experts, getattr(block, row.router), block.experts)
        for name, block in model.named_modules()
        if hasattr(block, "experts") and hasattr(block, row.router)
    ]
    if not found:
        why = "no MoE layer in it"
        raise ExpertlyError("E305", type(model).__name__, why, fix="open an MoE checkpoint")
    return found


def own_policy(config: Mapping[str, Any]) -> Policy:
    """The policy that a family's own code follows, so that attaching it changes nothing.

    config: the model's, as a dict.
    """
    row = require_family(config)
    return Policy(router=row.rule, top_k=sizes(config).top_k, options=rule_options(config))


def selection_bias(router: nn.Module, path: str) -> Tensor:
    """The selection bias at a family's dotted path: (experts,), sharing the family's own storage.

    Ernie's is (1, experts).
    """
    return _bias_tensor(router, path).flatten()


def cast_bias(router: nn.Module, path: str, dtype: torch.dtype) -> None:
    """Give a router's selection bias another dtype; buffer or parameter, it stays the same one."""
    bias = _bias_tensor(router, path)
    bias.data = bias.data.to(dtype)


def _bias_tensor(router: nn.Module, path: str) -> Tensor:
    module, _, name = path.rpartition(".")
    return getattr(router.get_submodule(module), name)


def router_logits(router: Any, x: Tensor) -> Tensor:
    """The router's logits in float32, whatever the model runs in: (tokens, experts)."""
    bias = getattr(router, "bias", None)
    return F.linear(x.float(), router.weight.float(), None if bias is None else bias.float())
