"""Attach a routing policy to a model by hooks, see what it decides, and detach without a trace.

The hook on a router recomputes its logits in float32, asks the policy, and returns the triple
(logits, weights, experts) that the block expects. Decisions are kept while the model's forward
runs only: a checkpointed forward that is run again during backward decides the same, unrecorded.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.families import require_family
from expertly.models.layers import MoeLayer, moe_layers, own_policy, router_logits
from expertly.moe.policy import NEEDS_BIAS, Decision, Policy, check_policy, decide
from expertly.moe.routing import Routing, Tokens, jitter


class Attachment:
    """A policy at work on a model, and what it decided in the latest forward.

    tokens: which of the flat tokens are valid, and their sequences. decisions: one per MoE layer.
    bias: per layer, (experts,) float32 or None when the rule has none; the family's own tensor
    where it has one. Use it as a context manager, or call detach().
    """

    def __init__(self, model: PreTrainedModel, policy: Policy | None):
        self.policy = policy
        self.layers = moe_layers(model)
        self._own = own_policy(model.config.to_dict()).router
        self.bias = [_bias_of(model, layer, policy) for layer in self.layers]
        self.tokens: Tokens | None = None
        self._decisions: list[Decision | None] = []
        self._recording = False
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.router.register_forward_hook(self._hook(index)))

    @property
    def decisions(self) -> list[Decision]:
        """What each MoE layer decided in the latest forward."""
        made = [decision for decision in self._decisions if decision is not None]
        assert len(made) == len(self.layers), "a router's hook did not fire"
        return made

    @property
    def rule(self) -> str:
        """The name of the routing rule that decides; the family's own when none was attached."""
        return self.policy.router if self.policy else self._own

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

    def _hook(self, index: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def hook(router: nn.Module, args: tuple, output: tuple) -> tuple[Tensor, Tensor, Tensor]:
            decision = self._decide(index, router, args[0], output)
            if self._recording:
                self._decisions[index] = decision
            return decision.served[:3]

        return hook

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
    """Make every MoE layer of a model follow `policy`; None keeps its own rule and only looks.

    Raises E204 for a policy the model cannot follow, E306 for an unknown family.
    """
    if policy is not None:
        check_policy(policy, moe_layers(model)[0].num_experts)
    return Attachment(model, policy)


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
    if attention_mask is not None and attention_mask.dim() == 2:
        valid = attention_mask[:, -seq:].bool()  # decoding passes the whole past's mask
    starts = torch.zeros(batch, seq, dtype=torch.bool, device=like.device)
    if position_ids is not None and position_ids.shape == starts.shape:
        starts = position_ids == 0
    starts[:, 0] = True
    return Tokens(valid.flatten(), starts.flatten().cumsum(0) - 1)


def _bias_of(model: PreTrainedModel, layer: MoeLayer, policy: Policy | None) -> Tensor | None:
    """Where this layer's selection bias lives: the family's tensor, or one of our own."""
    if policy is None or policy.router not in NEEDS_BIAS:
        return None
    row = require_family(model.config.to_dict())
    if row.bias is not None:
        return getattr(layer.router, row.bias)
    return torch.zeros(layer.num_experts, device=layer.router.weight.device)
