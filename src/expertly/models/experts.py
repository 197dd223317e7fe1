"""The experts seam: our experts function under transformers' name for it, and expert dropout."""

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
