"""AdamW with the groups that an MoE needs: routers by themselves, no decay on norms and biases."""

import torch
from torch import nn
from torch.optim import AdamW

from expertly.train.config import OptimConfig


def build_optimizer(model: nn.Module, routers: list[nn.Module], optim: OptimConfig) -> AdamW:
    """One group for matrices, one for norms and biases, one for routers; each with its `base_lr`.

    A router learning rate of 0 freezes the routers.
    """
    router_rate = optim.router_learning_rate
    router_rate = optim.learning_rate if router_rate is None else router_rate
    of_routers = {id(p) for router in routers for p in router.parameters()}
    if router_rate == 0:
        for router in routers:
            router.requires_grad_(False)
    rest = [p for p in model.parameters() if id(p) not in of_routers and p.requires_grad]
    gates = [p for router in routers for p in router.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "lr": optim.learning_rate},
        {"params": [p for p in rest if p.dim() < 2], "lr": optim.learning_rate, "weight_decay": 0},
        {"params": [p for p in gates if p.dim() >= 2], "lr": router_rate},
        {"params": [p for p in gates if p.dim() < 2], "lr": router_rate, "weight_decay": 0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: AdamW, factor: float) -> None:
    """Scale every group's own rate by the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip(model: nn.Module, max_norm: float) -> float:
    """Clip the gradients to max_norm (0: leave them) and return their norm before."""
    limit = max_norm if max_norm > 0 else float("inf")
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
