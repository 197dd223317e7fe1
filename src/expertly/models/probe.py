"""How strong each expert's answers are: a few tokens through the very experts that are in use.

A hook on every layer's experts module gives, in a forward that it was armed for, at most four of
each expert's own tokens to that expert once more, alone and with weight 1. So an expert that is
chosen and says nothing is seen, under any experts implementation. It draws no random numbers and
stays outside autograd: looking changes nothing. What the norms mean is for expertly.watch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertly.families import require_family
from expertly.models.answers import ANSWERS
from expertly.models.attach import stacks, tokens_of
from expertly.models.layers import moe_layers

_TOKENS = 4  # per expert and look: enough for a mean that is meant to tell 1 from 0.01


class OutputProbe:
    """Mean output norm per expert, ||f_j(x)||, of the forwards that it was armed for."""

    def __init__(self, model: PreTrainedModel):
        self._layers = moe_layers(model)
        self._answer = ANSWERS[require_family(model.config.to_dict()).answer]
        self._armed = self._looking = False
        self._valid: dict[int, Tensor] = {}  # (tokens,) by layer, while a forward is looked at
        self._sums = [torch.zeros(2, layer.num_experts) for layer in self._layers]
        self._looks = [0] * len(self._layers)
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]
        # partials of methods, unlike closures, still fit after deepcopy(model)
        for stack, indices in stacks(model, self._layers):
            see = partial(self._see, indices)
            self._handles.append(stack.register_forward_pre_hook(see, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            hook = partial(self._look, index)
            self._handles.append(layer.experts.register_forward_hook(hook))

    def arm(self) -> None:
        """Look at the next forward of the whole model."""
        self._armed = True

    def read(self) -> Tensor | None:
        """The mean norms since the last read, and start again: (layers, experts) on the CPU.

        NaN for an expert that got no token; None when no forward was looked at.
        """
        if not all(self._looks):
            return None
        norm, tokens = torch.stack([sums.cpu() for sums in self._sums]).unbind(1)
        self._sums = [torch.zeros_like(sums) for sums in self._sums]
        self._looks = [0] * len(self._layers)
        return norm / tokens  # 0 / 0 is NaN

    def detach(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()

    def _open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._looking, self._armed = self._armed, False

    def _see(
        self, indices: Sequence[int], stack: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        if self._looking:
            self._valid.update(dict.fromkeys(indices, tokens_of(*args, **kwargs).valid))

    def _close(self, model: nn.Module, args: tuple, output: object) -> None:
        self._looking = False  # what a checkpoint runs again during backward is not looked at
        self._valid = {}

    def _look(self, index: int, experts: nn.Module, args: tuple, output: Tensor) -> None:
        if index not in self._valid:
            return
        num_experts = self._layers[index].num_experts
        hidden, chosen = self._answer.asked(args, num_experts)
        valid = self._valid[index].to(chosen.device)
        valid = valid.repeat(len(chosen) // len(valid))  # where each expert has a row per token
        token, there = sample(chosen, valid, num_experts)
        expert = torch.arange(num_experts, device=chosen.device).repeat_interleave(_TOKENS)
        with _unseen(experts, hidden.device.type):
            # forward itself: hooks on the module must not take these for tokens of the batch
            answers = self._answer.ask(experts, hidden[token.flatten()], expert.to(chosen.dtype))
            norms = answers.float().norm(dim=-1).view(num_experts, _TOKENS)
            norms = norms.where(there, 0.0).sum(dim=-1)
            found = torch.stack([norms, there.sum(dim=-1).to(norms.dtype)])
            self._sums[index] = self._sums[index].to(found.device) + found
        self._looks[index] += 1


def sample(chosen: Tensor, valid: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A few valid tokens of every expert, spread evenly over the batch.

    chosen: (tokens, top_k); valid: (tokens,). Returns token indices (experts, 4), and which of
    them are really there: an expert may have fewer. The shapes do not depend on the data, and
    nothing waits for the device.
    """
    slots = chosen.where(valid.unsqueeze(-1), num_experts).flatten()
    order = slots.argsort(stable=True)
    counts = slots.new_zeros(num_experts + 1).scatter_add_(0, slots, torch.ones_like(slots))
    counts = counts[:num_experts]
    stride = (counts / _TOKENS).clamp(min=1).unsqueeze(-1)
    nth = (torch.arange(_TOKENS, device=slots.device) * stride).long()  # (experts, 4)
    there = nth < counts.unsqueeze(-1)
    first = counts.cumsum(0) - counts
    at = (first.unsqueeze(-1) + nth).where(there, 0)
    return order[at] // chosen.shape[-1], there


@contextmanager
def _unseen(experts: nn.Module, device: str) -> Iterator[None]:
    """Neither autograd nor dropout, and autocast's cache keeps no weights without gradients."""
    modes = [(module, module.training) for module in experts.modules()]
    autocast = torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )
    experts.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
