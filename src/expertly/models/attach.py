"""Attach a routing policy to a model by hooks, see what it decides, and detach without a trace.

The hook on a router recomputes its logits in float32, asks the policy, and returns what the block
expects, mostly (logits, weights, experts). Decisions are kept while the model's forward runs only:
a checkpointed forward that is run again during backward decides the same, unrecorded.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.errors import ExpertlyError
from expertly.families import require_family
from expertly.models.answers import ANSWERS
from expertly.models.layers import (
    LOGITS,
    MoeLayer,
    cast_bias,
    moe_layers,
    own_policy,
    router_device,
    selection_bias,
)
from expertly.moe.policy import Decision, Policy, check_policy, decide
from expertly.moe.routing import ROUTERS, Tokens, jitter


class Attachment:
    """A policy at work on a model, and what it decided in the latest forward.

    decisions: one per MoE layer. rule: the name of the routing rule that decides. One that only
    looks tells of the policy at work. Use it as a context manager, or call detach().
    """

    def __init__(self, model: PreTrainedModel, policy: Policy | None):
        config = model.config.to_dict()
        self.policy = policy
        self.layers = moe_layers(model)
        self._own_rule = own_policy(config).router
        self.rule = self._rule_on(model)
        self._tokens: list[Tokens | None] = [None] * len(self.layers)
        self._masks: dict[int, Tensor] = {}  # of valid tokens, while a layer may use them
        self._decisions: list[Decision | None] = [None] * len(self.layers)
        self._recording = False
        row = require_family(config)
        self._bias_name, self._logits, self._answer = row.bias, row.logits, row.answer
        self._bias_dtypes: list[torch.dtype] = []  # of the family's own, before this one
        self._bias = self._first_bias()
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]
        # partials of methods, unlike closures, still fit after deepcopy(model)
        for stack, indices in stacks(model, self.layers):
            see, forget = partial(self._see, indices), partial(self._forget, indices)
            self._handles.append(stack.register_forward_pre_hook(see, with_kwargs=True))
            self._handles.append(stack.register_forward_hook(forget, always_call=True))
        for index, layer in enumerate(self.layers):
            hook = partial(self._route, index)
            self._handles.append(layer.router.register_forward_hook(hook))

    @property
    def decisions(self) -> list[Decision]:
        """What each MoE layer decided in the latest forward; ValueError before a whole one."""
        made = [decision for decision in self._decisions if decision is not None]
        if len(made) < len(self.layers):
            raise ValueError("no decisions yet: call the model itself first, model(input_ids)")
        return made

    @property
    def tokens(self) -> Tokens | None:
        """Which of the flat tokens are valid, and their sequences, as the first MoE layer sees it.

        None before a forward that it takes part in.
        """
        return self._tokens[0]

    @property
    def tokens_by_layer(self) -> list[Tokens]:
        """The same per MoE layer: a decoder behind an encoder sees other tokens."""
        return [tokens for tokens in self._tokens if tokens is not None]

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
            return [selection_bias(layer.block, self._bias_name) for layer in self.layers]
        devices = [router_device(layer.router) for layer in self.layers]
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
            bias = selection_bias(layer.block, self._bias_name)
            if bias.dtype == torch.float32 and bias.to(dtype).float().equal(bias):
                cast_bias(layer.block, self._bias_name, dtype)

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
        self.rule = self._rule_on(model)
        self._tokens = [None] * len(self.layers)
        self._decisions = [None] * len(self.layers)
        self._recording = True

    def _see(
        self, indices: Sequence[int], stack: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        tokens = tokens_of(*args, **kwargs)
        for index in indices:
            self._masks[index] = tokens.valid
            if self._recording:
                self._tokens[index] = tokens

    def _forget(
        self, indices: Sequence[int], stack: nn.Module, args: tuple, output: object
    ) -> None:
        if torch.is_grad_enabled():  # backward may run a checkpoint again
            return
        for index in indices:
            self._masks.pop(index, None)

    def _close(self, model: nn.Module, args: tuple, output: object) -> None:
        self._recording = False
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
    ) -> tuple[Tensor, ...] | None:
        decision = self._decide(index, router, args[0], output)
        if self._recording:
            self._decisions[index] = decision
        if self.policy is None:
            return None
        return ANSWERS[self._answer].write(router, output, decision.served)

    def _first_bias(self) -> list[Tensor]:
        """Where each layer's bias begins: the family's tensor in float32, or zeros of our own."""
        if self.policy is None or not ROUTERS[self.policy.router].biased:
            return []
        if self._bias_name is None:
            return [
                torch.zeros(layer.num_experts, device=router_device(layer.router))
                for layer in self.layers
            ]
        for layer in self.layers:  # steps of 0.001 would vanish in bfloat16
            self._bias_dtypes.append(selection_bias(layer.block, self._bias_name).dtype)
            cast_bias(layer.block, self._bias_name, torch.float32)
        return [selection_bias(layer.block, self._bias_name) for layer in self.layers]

    def _decide(self, index: int, router: nn.Module, x: Tensor, output: tuple) -> Decision:
        answer = ANSWERS[self._answer]
        if self.policy is None:
            routing = answer.read(router, output)
            return Decision(routing, routing)
        x = x.reshape(-1, x.shape[-1])
        if len(self._masks.get(index, ())) != len(x):
            raise ValueError("the attached policy needs the mask: call the model, not a part of it")
        with torch.autocast(x.device.type, enabled=False):
            if router.training and self.policy.jitter:
                x = jitter(x, self.policy.jitter)
            decision = decide(
                self.policy,
                LOGITS[self._logits](router, x),
                self._masks[index],
                bias=self.bias[index],
                training=router.training,
            )
            return decision._replace(served=answer.limit(router, output, decision.served))


def attach(model: PreTrainedModel, policy: Policy | None = None) -> Attachment:
    """Make every MoE layer of a model follow `policy`; None keeps its rule and only looks.

    A policy attached before is overruled until this one is detached. Raises E204 for a policy the
    model cannot follow, E306 for an unknown family.
    """
    if policy is not None:
        check_policy(policy, moe_layers(model)[0].num_experts)
        _require_own(model.config.to_dict(), policy)
    return Attachment(model, policy)


def _require_own(config: Mapping[str, Any], policy: Policy) -> None:
    """Raises E204 for a family that can follow no rule but its own, and a policy with another."""
    row, own = require_family(config), own_policy(config)
    if row.only_own is not None and policy.at_inference() != own.at_inference():
        fix = f"choose {own.router}; capacity and jitter are free"
        raise ExpertlyError("E204", f"router {policy.router} on {row.name}", row.only_own, fix=fix)


def attached(model: nn.Module) -> Attachment | None:
    """The attachment whose policy a model follows, if any."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    found = [each for each in owners if isinstance(each, Attachment) and each.policy is not None]
    return found[-1] if found else None


def stacks(model: Any, layers: Sequence[MoeLayer]) -> Iterator[tuple[nn.Module, list[int]]]:
    """The modules that tokens enter, each with the indices of the MoE layers that see them.

    Of an encoder-decoder both sides: generating calls the encoder once, outside the model's own
    forward.
    """
    if not model.config.is_encoder_decoder:
        yield model, [*range(len(layers))]
        return
    for side in ("encoder", "decoder"):
        indices = [i for i, layer in enumerate(layers) if layer.name.startswith(f"{side}.")]
        if indices:
            yield model.get_submodule(side), indices


def tokens_of(
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *_: object,
    inputs_embeds: Tensor | None = None,
    **__: object,
) -> Tokens:
    """Which flat tokens are valid and which sequence they belong to, from a forward's arguments.

    A row is a sequence; position_ids (batch, seq) that start again at 0 within a row begin another,
    and where none follows at 1, the token is padding behind packed sequences.
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
        alone = starts.clone()
        alone[:, :-1] &= position_ids[:, 1:] != 1
        alone[:, 0] = False  # as the first token of all is in decoding
        valid = valid & ~alone
    starts[:, 0] = True
    return Tokens(valid.flatten(), starts.flatten().cumsum(0) - 1)
