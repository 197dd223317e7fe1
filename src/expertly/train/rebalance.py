"""What `router.on_collapse=rebalance` does: draw a collapsed router anew, and steer it afterwards.

Drawing alone would not last, because what collapsed the router is still there. So a remedy goes
with it, that the loop keeps in its progress and applies at every step: a least balance loss, and a
highest learning rate for routers. When a router has collapsed is for expertly.watch.alarms.
"""

from dataclasses import dataclass, field, replace

import torch
from torch.optim import AdamW

from expertly.models.attach import Attachment
from expertly.models.loading import Model
from expertly.train.config import OptimConfig, RouterConfig

_AUX = 0.02  # on Hugging Face's scale


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What steers a run's routers once some were drawn anew; plain values, so that JSON holds it.

    Before the first dose it changes nothing.
    """

    times: int = 0  # doses given so far
    layers: list[int] = field(default_factory=list)  # drawn anew under the present dose
    aux_floor: float = 0.0  # router_aux_loss_coef is at least this
    router_lr_cap: float | None = None  # and the routers' learning rate at most this

    def after(self, optim: OptimConfig, layers: list[int]) -> "Remedy":
        """The remedy after rebalancing some layers: stronger when one of them has relapsed.

        Each dose has twice the floor and half the rate of the one before. A cause is seen in one
        layer sooner than in another, so others that follow get the dose that is there.
        """
        if self.times and not set(layers) & set(self.layers):
            return replace(self, layers=sorted({*self.layers, *layers}))
        dose = 2**self.times
        return Remedy(
            times=self.times + 1,
            layers=sorted(layers),
            aux_floor=_AUX * dose,
            router_lr_cap=optim.learning_rate / dose,
        )

    def router(self, config: RouterConfig) -> RouterConfig:
        """The router's config as it is to be followed from now on."""
        coef = max(config.router_aux_loss_coef, self.aux_floor)
        return replace(config, router_aux_loss_coef=coef)

    def cap(self, optimizer: AdamW, attachment: Attachment) -> None:
        """Lower the routers' own rate to the cap; once after rebalancing, and once at a resume."""
        if self.router_lr_cap is None:
            return
        of_routers = {id(p) for layer in attachment.layers for p in layer.router.parameters()}
        for group in optimizer.param_groups:
            if of_routers & {id(parameter) for parameter in group["params"]}:
                group["base_lr"] = min(group["base_lr"], self.router_lr_cap)


@torch.no_grad()
def rebalance(model: Model, attachment: Attachment, optimizer: AdamW, layers: list[int]) -> None:
    """Draw the routers of some MoE layers anew, in place, and forget what was learnt of them.

    Small random rows, from torch's own generator, so that a resumed run draws the same; biases of
    0, the selection's too; no moments in the optimizer.
    """
    std = getattr(model.config, "initializer_range", None) or 0.02
    for index in layers:
        router, bias = attachment.layers[index].router, attachment.bias[index]
        for name, parameter in router.named_parameters():
            optimizer.state.pop(parameter, None)
            if name.endswith("bias"):  # Ernie's has two axes, too
                parameter.zero_()
            elif parameter.dim() > 1:  # scales stay: at 0 nothing would pass them
                parameter.copy_(torch.empty(parameter.shape).normal_(std=std))
        if bias is not None:
            bias.zero_()
