"""Attach a routing policy to a model by hooks, see what it decides, and detach without a trace.

The hook on a router recomputes its logits in float32, asks the policy, and returns the triple
(logits, weights, experts) that the block expects. Decisions are kept while the model's forward
runs only: a checkpointed forward that is run again during backward decides the same, unrecorded.
"""

from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.families import require_family
from expertly.models.layers import (
    cast_bias,
    moe_layers,
    own_policy,
    router_logits,
    selection_bias,
)
from expertly.moe.policy import Decision, Policy, check_policy, decide
from expertly.moe.routing import ROUTERS, Routing, Tokens, jitter


class Attachment:
    """A policy at work on a model, and what it decided in the latest forward.

    tokens: which of the flat tokens are valid, and their sequences. decisions: one per MoE layer.
    rule: the name of the routing rule that decides. One that only looks tells of the policy at
    work. Use it as a context manager, or call detach().
    """

    def __init__(self, model: PreTrainedModel, policy: Policy | None):
        config = model.config.to_dict()
        self.policy = policy
        self.layers = moe_layers(model)
        self._own_rule = own_policy(config).router
        self.rule = self._rule_on(model)
        self.tokens: Tokens | None = None
        self._mask: Tensor | None = None  # of valid tokens, while a forward may use it
        self._decisions: list[Decision | None] = [None] * len(self.layers)
        self._recording = False
        self._bias_name = require_family(config).bias
        self._bias_dtypes: list[torch.dtype] = []  # of the family's own, before this one
        self._bias = self._first_bias()
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]
        for index, layer in enumerate(self.layers):
            # a partial of a method, unlike a closure, still fits after deepcopy(model)
            hook = partial(self._route, index)
            self._handles.append(layer.router.register_forward_hook(hook))

    @property
    def decisions(self) -> list[Decision]:
        """What each MoE layer decided in the latest forward; ValueError before a whole one."""
        made = [decision for decision in self._decisions if decision is not None]
        if len(made) < len(self.layers):
            raise ValueError("no decisions yet: call the model itself first, model(input_ids)")
        return made

    def unseen(self) -> str | None:
        """The first MoE layer whose router did not run in the latest forward; None: all did."""
        pairs = zip(self.layers, self._decisions, strict=True)
        return next((layer.name for layer, decision in pairs if decision is None), None)

    @property
    def bias(self) -> list[Tensor] | list[None]:
        """Per layer the selection bias, (experts,) float32, or None when the rule has none.

        The family's own tensor where it has one. Change it in place.
        """
        if not self._bias:
            return [None] * len(self.layers)
        # looked up every time, because model.to() puts other tensors in the place of buffers
        if self._bias_name is not None:
            return [selection_bias(layer.router, self._bias_name) for layer in self.layers]
        devices = [layer.router.weight.device for layer in self.layers]
        self._bias = [b.to(device) for b, device in zip(self._bias, devices, strict=True)]
        return self._bias

    def biases(self) -> Tensor | None:
        """Every layer's bias: (layers, experts); None when the rule has none."""
        found = [bias for bias in self.bias if bias is not None]
        return torch.stack(found) if found else None

    def detach(self) -> None:
        """Take every hook out again, and a family's bias out of float32 where that loses nothing.

        One that was trained since stays in float32, as checkpoints keep it. Detach the latest
        first.
        """
        for handle in self._handles:
            handle.remove()
        for layer, dtype in zip(self.layers, self._bias_dtypes, strict=False):
            assert self._bias_name is not None
            bias = selection_bias(layer.router, self._bias_name)
            if bias.dtype == torch.float32 and bias.to(dtype).float().equal(bias):
                cast_bias(layer.router, self._bias_name, dtype)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.detach()

    def _open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tokens = tokens_of(*args, **kwargs)
        self._mask = self.tokens.valid
        self.rule = self._rule_on(model)
        self._decisions = [None] * len(self.layers)
        self._recording = True

    def _close(self, model: nn.Module, args: tuple, output: object) -> None:
        self._recording = False
        if not torch.is_grad_enabled():  # with gradients, backward may run a checkpoint again
            self._mask = None
        at_work = attached(model)
        if self.policy is None and at_work is not None:
            # only its own decisions say what capacity dropped, a router's output does not
            self._decisions = at_work._decisions

    def _rule_on(self, model: nn.Module) -> str:
        """The name of the rule that decides, while this one is attached."""
        at_work = attached(model)
        policy = self.policy or (at_work and at_work.policy)
        return policy.router if policy else self._own_rule

    def _route(
        self, index: int, router: nn.Module, args: tuple, output: tuple
    ) -> tuple[Tensor, Tensor, Tensor]:
        decision = self._decide(index, router, args[0], output)
        if self._recording:
            self._decisions[index] = decision
        return decision.served[:3]

    def _first_bias(self) -> list[Tensor]:
        """Where each layer's bias begins: the family's tensor in float32, or zeros of our own."""
        if self.policy is None or not ROUTERS[self.policy.router].biased:
            return []
        if self._bias_name is None:
            weights = [layer.router.weight for layer in self.layers]
            return [torch.zeros(len(weight), device=weight.device) for weight in weights]
        for layer in self.layers:  # steps of 0.001 would vanish in bfloat16
            self._bias_dtypes.append(selection_bias(layer.router, self._bias_name).dtype)
            cast_bias(layer.router, self._bias_name, torch.float32)
        return [selection_bias(layer.router, self._bias_name) for layer in self.layers]

    def _decide(self, index: int, router: nn.Module, x: Tensor, output: tuple) -> Decision:
        if self.policy is None:
            routing = Routing(*output)
            return Decision(routing, routing)
        x = x.reshape(-1, x.shape[-1])
        if self._mask is None or len(self._mask) != len(x):
            raise ValueError("the attached policy needs the mask: call the model, not a part of it")
        with torch.autocast(x.device.type, enabled=False):
            if router.training and self.policy.jitter:
                x = jitter(x, self.policy.jitter)
            return decide(
                self.policy,
                router_logits(router, x),
                self._mask,
                bias=self.bias[index],
                training=router.training,
            )


def attach(model: PreTrainedModel, policy: Policy | None = None) -> Attachment:
    """Make every MoE layer of a model follow `policy`; None keeps its rule and only looks.

    A policy attached before is overruled until this one is detached. Raises E204 for a policy the
    model cannot follow, E306 for an unknown family.
    """
    if policy is not None:
        check_policy(policy, moe_layers(model)[0].num_experts)
    return Attachment(model, policy)


def attached(model: nn.Module) -> Attachment | None:
    """The attachment whose policy a model follows, if any."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    found = [each for each in owners if isinstance(each, Attachment) and each.policy is not None]
    return found[-1] if found else None


def tokens_of(
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *_: object,
    inputs_embeds: Tensor | None = None,
    **__: object,
) -> Tokens:
    """Which flat tokens are valid and which sequence they belong to, from a forward's arguments.

    A row is a sequence; position_ids (batch, seq) that start again at 0 within a row begin another.
    """
    like = input_ids if input_ids is not None else inputs_embeds
    if like is None:
        raise ValueError("nothing to route: give the model input_ids or inputs_embeds")
    batch, seq = like.shape[:2]
    valid = torch.ones(batch, seq, dtype=torch.bool, device=like.device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        valid = attention_mask[:, -seq:].bool()  # decoding passes the whole past's mask
    starts = torch.zeros(batch, seq, dtype=torch.bool, device=like.device)
    if position_ids is not None and position_ids.shape == starts.shape:
        starts = position_ids == 0
    starts[:, 0] = True
    return Tokens(valid.flatten(), starts.flatten().cumsum(0) - 1)
