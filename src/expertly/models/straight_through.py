"""Straight-through router gradients: every expert teaches the router, top_k of them compute.

DenseMixer (Yao et al. 2025, repository yaof20/DenseMixer): y = sparse + dense - detached dense,
where dense weighs all experts. Here the forward is left as it is, to the bit, and nothing of it is
kept; backward asks the experts that a token did not use, one expert at a time, without gradients.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from expertly.errors import ExpertlyError
from expertly.families import require_family
from expertly.models.answers import ANSWERS
from expertly.models.attach import Attachment
from expertly.moe.routing import ROUTERS

_ANSWER = "triple"  # experts are handed weights for what they answer


class StraightThrough:
    """The dense mixture's gradient for the routers of a model, in training only.

    An assignment that capacity dropped counts as unused; a token that lost all of its own gets
    no more gradient than without this. Call detach() to take it out again.
    """

    def __init__(self, config: Mapping[str, Any], attachment: Attachment):
        check_straight_through(config, attachment.rule)
        if any(hasattr(layer.experts, "packed") for layer in attachment.layers):
            raise _refused("packed experts are not trained")
        self._attachment = attachment
        self._logits: dict[int, Tensor] = {}  # by layer, from its router to its experts
        self._handles: list[RemovableHandle] = []
        # partials of methods, unlike closures, still fit after deepcopy(model)
        for index, layer in enumerate(attachment.layers):
            keep, mix = partial(self._keep, index), partial(self._mix, index)
            self._handles.append(layer.router.register_forward_hook(keep))
            self._handles.append(layer.experts.register_forward_hook(mix))

    def detach(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, index: int, router: nn.Module, args: tuple, output: tuple) -> None:
        if router.training and torch.is_grad_enabled():
            self._logits[index] = output[0]

    def _mix(self, index: int, experts: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        logits = self._logits.pop(index, None)
        if logits is None:
            return None
        hidden, chosen, weights = args[:3]
        used = weights != 0  # what was dropped has weight 0
        gates = dense_gates(self._attachment.rule, logits, chosen, weights.detach())
        return _DenseGradient.apply(output, gates, hidden.detach(), chosen, used, experts)


def check_straight_through(config: Mapping[str, Any], rule: str) -> None:
    """Raises E204 where a rule's weights, or a family's experts, know no dense mixture."""
    row = require_family(config)
    if row.answer != _ANSWER:
        raise _refused(f"the experts of {row.name} are not handed a weight for what they answer")
    if rule == "sparsemixer":
        raise _refused("sparsemixer weighs each expert by another softmax, so none weighs all")


def _refused(why: str) -> ExpertlyError:
    return ExpertlyError("E204", "router.straight_through", why, fix="leave it out")


def dense_gates(rule: str, logits: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every expert's weight in the dense mixture: (tokens, experts), float32.

    logits: (tokens, experts); chosen, weights: (tokens, top_k), what the rule gave. Scores are
    scaled as the chosen ones were, by a factor that passes no gradient.
    """
    scores = ROUTERS[rule].score(logits)
    taken = scores.detach().gather(-1, chosen) * (weights != 0)
    factor = weights.float().sum(dim=-1, keepdim=True) / taken.sum(-1, keepdim=True).clamp(1e-20)
    return scores * factor


class _DenseGradient(torch.autograd.Function):
    """The sparse output as it is; backward gives each unused expert's gate its gradient.

    The used ones have theirs through the sparse output: live norm and all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        gates: Tensor,
        hidden: Tensor,
        chosen: Tensor,
        used: Tensor,
        experts: nn.Module,
    ) -> Tensor:
        device = hidden.device.type
        ctx.save_for_backward(hidden, chosen, used)
        ctx.experts, ctx.num_experts = experts, gates.shape[-1]
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return output.clone()  # not itself: blocks add to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, chosen, used = ctx.saved_tensors
        hidden, rows = hidden.flatten(0, -2), grad.flatten(0, -2)
        taken = torch.zeros(len(hidden), ctx.num_experts, dtype=torch.bool, device=hidden.device)
        unused = ~taken.scatter(1, chosen, used)
        gates = torch.zeros(unused.shape, device=grad.device)
        with _quiet(ctx.experts, hidden.device.type, ctx.dtype):
            for expert in range(ctx.num_experts):
                tokens = unused[:, expert].nonzero().squeeze(-1)
                if len(tokens):
                    ids = chosen.new_full((len(tokens),), expert)
                    # forward itself: hooks on the module must not take these for the batch's tokens
                    answers = ANSWERS[_ANSWER].ask(ctx.experts, hidden[tokens], ids)
                    gates[tokens, expert] = (answers.float() * rows[tokens].float()).sum(dim=-1)
        return grad, gates, None, None, None, None


@contextmanager
def _quiet(experts: nn.Module, device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """The forward's autocast again, without its cache; and no dropout, which would draw."""
    modes = [(module, module.training) for module in experts.modules()]
    experts.eval()
    try:
        enabled = dtype is not None
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
