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
from expertly.models.layers import moe_layers, own_policy, router_logits
from expertly.moe.policy import NEEDS_BIAS, Decision, Policy, check_policy, decide
from expertly.moe.routing import Routing, Tokens, jitter


class Attachment:
    """A policy at work on a model, and what it decided in the latest forward.

    tokens: which of the flat tokens are valid, and their sequences. decisions: one per MoE layer.
    rule: the name of the routing rule that decides. Use it as a context manager, or call detach().
    """

    def __init__(self, model: PreTrainedModel, policy: Policy | None):
        config = model.config.to_dict()
        before = attached(model)
        self.policy = policy
        self.layers = moe_layers(model)
        self.rule = (policy or (before and before.policy) or own_policy(config)).router
        self.tokens: Tokens | None = None
        self._decisions: list[Decision | None] = []
        self._recording = False
        self._bias_name = require_family(config).bias
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
        """What each MoE layer decided in the latest forward."""
        made = [decision for decision in self._decisions if decision is not None]
        assert len(made) == len(self.layers), "a router's hook did not fire"
        return made

    @property
    def bias(self) -> list[Tensor] | list[None]:
        """Per layer the selection bias, (experts,) float32, or None when the rule has none.

        The family's own tensor where it has one. Change it in place.
        """
        if not self._bias:
            return [None] * len(self.layers)
        # looked up every time, because model.to() puts other tensors in the place of buffers
        if self._bias_name is not None:
            return [getattr(layer.router, self._bias_name) for layer in self.layers]
        devices = [layer.router.weight.device for layer in self.layers]
        self._bias = [b.to(device) for b, device in zip(self._bias, devices, strict=True)]
        return self._bias

    def biases(self) -> Tensor | None:
        """Every layer's bias: (layers, experts); None when the rule has none."""
        found = [bias for bias in self.bias if bias is not None]
        return torch.stack(found) if found else None

    def detach(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()

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
        self._decisions = [None] * len(self.layers)
        self._recording = True

    def _close(self, model: nn.Module, args: tuple, output: object) -> None:
        self._recording = False

    def _route(
        self, index: int, router: nn.Module, args: tuple, output: tuple
    ) -> tuple[Tensor, Tensor, Tensor]:
        decision = self._decide(index, router, args[0], output)
        if self._recording:
            self._decisions[index] = decision
        return decision.served[:3]

    def _first_bias(self) -> list[Tensor]:
        """Where each layer's bias begins: the family's tensor in float32, or zeros of our own."""
        if self.policy is None or self.policy.router not in NEEDS_BIAS:
            return []
        if self._bias_name is None:
            weights = [layer.router.weight for layer in self.layers]
            return [torch.zeros(len(weight), device=weight.device) for weight in weights]
        for layer in self.layers:  # steps of 0.001 would vanish in bfloat16
            setattr(layer.router, self._bias_name, getattr(layer.router, self._bias_name).float())
        return [getattr(layer.router, self._bias_name) for layer in self.layers]

    def _decide(self, index: int, router: nn.Module, x: Tensor, output: tuple) -> Decision:
        if self.policy is None:
            routing = Routing(*output)
            return Decision(routing, routing)
        assert self.tokens is not None, "call the model itself, not a part of it"
        x = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            if router.training and self.policy.jitter:
                x = jitter(x, self.policy.jitter)
            return decide(
                self.policy,
                router_logits(router, x),
                self.tokens.valid,
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


def attached(model: PreTrainedModel) -> Attachment | None:
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
    assert like is not None, "a forward without input_ids or inputs_embeds"
    batch, seq = like.shape[:2]
    valid = torch.ones(batch, seq, dtype=torch.bool, device=like.device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        valid = attention_mask[:, -seq:].bool()  # decoding passes the whole past's mask
    starts = torch.zeros(batch, seq, dtype=torch.bool, device=like.device)
    if position_ids is not None and position_ids.shape == starts.shape:
        starts = position_ids == 0
    starts[:, 0] = True
    return Tokens(valid.flatten(), starts.flatten().cumsum(0) - 1)
