"""AdamW with the groups that an MoE needs: routers by themselves, no decay on norms and biases."""

import torch
from torch import nn
from torch.optim import AdamW

from expertly.train.config import OptimConfig


def build_optimizer(model: nn.Module, routers: list[nn.Module], optim: OptimConfig) -> AdamW:
    """Groups by what a parameter belongs to and whether it decays, each with its `base_lr`.

    A router learning rate of 0 freezes the routers.
    """
    router_rate = optim.router_learning_rate
    rates = {"rest": optim.learning_rate, "router": optim.learning_rate}
    if router_rate is not None:
        rates["router"] = router_rate
    of_routers = {id(p) for router in routers for p in router.parameters()}
    if rates["router"] == 0:
        for router in routers:
            router.requires_grad_(False)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "router" if id(parameter) in of_routers else "rest"
            groups.setdefault((part, _decays(name, parameter)), []).append(parameter)
    optimizer = AdamW(
        [
            {"params": group, "lr": rates[part]} | ({} if decays else {"weight_decay": 0.0})
            for (part, decays), group in groups.items()
        ],
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices do; norms and biases don't, nor do biases of stacked experts, which have 2 axes."""
    return parameter.dim() >= 2 and not name.endswith("bias")


def set_learning_rate(optimizer: AdamW, factor: float) -> None:
    """Scale every group's own rate by the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip(model: nn.Module, max_norm: float) -> float:
    """Clip the gradients to max_norm (0: leave them) and return their norm before."""
    limit = max_norm if max_norm > 0 else float("inf")
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
