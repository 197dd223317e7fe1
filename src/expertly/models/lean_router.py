"""A router's logits, scores and choice in one native call, for the rules most families follow."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.families import FAMILIES, Family, require_family
from expertly.kernels.native_ops import Operations, RouterForm, operations
from expertly.models.layers import moe_layers, own_policy
from expertly.models.lean_forward import LeanForward, agree, guarded, plain, random, ulps
from expertly.moe.policy import Policy

MOST = 8  # tokens; more of them are a matrix product, which torch does better


class LeanRouter(LeanForward):
    """(logits, weights, experts) by a RouterForm; bias: the name of the router's selection bias.

    dtypes: of x and the weight, when it was tried.
    """

    looked_up = staticmethod(operations)

    def __init__(
        self,
        native: Operations,
        form: RouterForm,
        bias: str | None,
        dtypes: tuple[torch.dtype, torch.dtype],
    ):
        self.native, self.form, self.bias, self.dtypes = native, form, bias, dtypes

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self.may(module, args[0]):
            return self.route(module, args[0])
        return type(module).forward(module, *args, **kwargs)

    def route(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The native answer to x (.., dim)."""
        weight = module.weight
        bias = None if self.bias is None else getattr(module, self.bias)
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        x = x.reshape(-1, weight.shape[1]).contiguous()
        return self.native.route(self.form, x, weight, bias)

    def may(self, module: Any, x: Tensor) -> bool:
        weight = module.weight
        return (
            self.native is not None
            and x.numel() <= MOST * weight.shape[1]
            and (x.dtype, weight.dtype) == self.dtypes
            and weight.is_contiguous()
            and not module.training
            and plain(x)
            and self.unchanged(module)
        )


def lean_routers(
    model: PreTrainedModel, native: Operations
) -> Iterator[tuple[nn.Module, LeanRouter]]:
    """The routers whose own answer a lean forward gives, too, each with that."""
    config = model.config.to_dict()
    if config["model_type"] not in FAMILIES or model.config.is_encoder_decoder:
        return
    row, policy = require_family(config), own_policy(config)
    form, bias = _form(policy), _bias(row)
    if form is None or row.logits != "linear" or row.answer != "triple":
        return
    for layer in moe_layers(model):
        weight = getattr(layer.router, "weight", None)
        if weight is None or not plain(weight) or getattr(layer.router, "bias", None) is not None:
            continue
        if policy.router.startswith("biased") and not hasattr(layer.router, bias or ""):
            continue
        x = random(MOST, weight.shape[1], dtype=model.dtype)
        lean = guarded(_tried, layer.router, native, form, bias, x)
        if lean is not None:
            yield layer.router, lean


def _tried(
    router: Any, native: Operations, form: RouterForm, bias: str | None, x: Tensor
) -> LeanRouter | None:
    """The lean forward, with the dtypes of the router's own answer; None if they differ."""
    stock = type(router).forward(router, x)
    logits, weights, experts = stock[:3]
    exact = not logits.to(x.dtype).to(logits.dtype).equal(logits) or x.dtype == torch.float32
    form = form._replace(exact=exact, logits_dtype=logits.dtype, weights_dtype=weights.dtype)
    lean = LeanRouter(native, form, bias, (x.dtype, router.weight.dtype))
    ours = lean.route(router, x)
    # sums in another order, and in bfloat16 what that tips
    near = ulps(16, torch.float32) if exact else ulps(1, x.dtype)
    alike = len(stock) == 3 and experts.shape == ours[2].shape and agree(ours[0], logits, near)
    return lean if alike and _chosen_alike(ours, stock) else None


def _chosen_alike(ours: tuple, stock: tuple) -> bool:
    """Whether the weights are the same, whatever the order of a token's experts.

    Not the experts themselves: of two with the same rounded score either may be chosen.
    """
    mine, own = (answer[1].sort(dim=-1).values for answer in (ours, stock))
    return agree(mine, own, ulps(8, ours[0].dtype))


def _form(policy: Policy) -> RouterForm | None:
    """A rule in the native router's words; None for one that it does not know."""
    said = {key: value for key, value in policy.options.items() if key != "ordered"}
    if policy.router == "softmax_topk" and said.get("num_groups", 1) == 1:
        return RouterForm(
            policy.top_k, renormalize=said.get("renormalize", True), scale=said.get("scale", 1.0)
        )
    if policy.router == "topk_softmax" and not said:
        return RouterForm(policy.top_k, score="softmax of the chosen")
    if policy.router == "biased_sigmoid_topk" and said.pop("closed", -torch.inf) == -torch.inf:
        said = {"renormalize": True, "epsilon": 1e-20, **said}
        return RouterForm(policy.top_k, score="sigmoid", **said)
    return None


def _bias(row: Family) -> str | None:
    """The selection bias's name in the router, where it is the router's."""
    prefix, _, name = (row.bias or "").rpartition(".")
    return name if name and prefix == row.router else None
