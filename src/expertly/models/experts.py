"""The experts seam: our experts function under transformers' name for it, and expert dropout."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from expertly.errors import ExpertlyError
from expertly.kernels.experts import experts_forward
from expertly.models.layers import moe_layers

EXPERTS = "expertly"  # the name for experts_implementation=


def register_experts() -> str:
    """Make `experts_implementation="expertly"` known to transformers; returns the name."""
    ExpertsInterface.register(EXPERTS, experts_forward)
    return EXPERTS


def expert_matrices(experts: Any) -> list[Tensor]:
    """Views of a module's stacks: gate, up and down, or up and down; (experts, out, in) each.

    A module that does not say its layout is taken for the most common one.
    """
    gated = hasattr(experts, "gate_up_proj")
    first, down = experts.gate_up_proj if gated else experts.up_proj, experts.down_proj
    if getattr(experts, "is_transposed", False):
        first, down = first.mT, down.mT
    if not gated:
        return [first, down]
    if getattr(experts, "is_concatenated", True):
        return [*first.chunk(2, dim=1), down]
    return [first[:, ::2], first[:, 1::2], down]


def add_expert_dropout(model: PreTrainedModel, probability: float) -> list[RemovableHandle]:
    """Drop inner activations of every expert in training (Switch Transformer, section 2.4).

    It sits on the activation function, because dropping act(gate) drops act(gate) * up too; so it
    works with every experts implementation. Raises E202 for a family whose experts keep it inside.
    """
    layers = moe_layers(model)
    if not all(isinstance(getattr(layer.experts, "act_fn", None), nn.Module) for layer in layers):
        family = model.config.model_type
        why = f"the experts of {family} compute their activation where no hook reaches"
        raise ExpertlyError("E202", "model.expert_dropout", why, fix="leave expert_dropout out")

    def hook(activation: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, probability, activation.training)

    return [layer.experts.act_fn.register_forward_hook(hook) for layer in layers]
