"""Parts of a model that stand still for a while, so that a router learns before its experts move.

At every step requires_grad says what moves: what stands still costs no backward of its own, and
AdamW passes over a parameter without a gradient, weight decay and all.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from expertly.errors import ExpertlyError
from expertly.models.attach import Attachment

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def frozen_parts(step: int, freeze: Mapping[str, int]) -> frozenset[str]:
    """The parts that stand still in the step after `step` others.

    freeze: by part for how many steps from the start, -1 throughout.
    """
    return frozenset(part for part, steps in freeze.items() if steps < 0 or step < steps)


def thawed(step: int, freeze: Mapping[str, int]) -> str | None:
    """What begins to move in the step after `step` others, in one line; None: nothing does."""
    now = frozen_parts(step, freeze)
    begins = frozen_parts(step - 1, freeze) - now if step else ()
    if not begins:
        return None
    line = f"step {step + 1}: no longer frozen: {', '.join(sorted(begins))}"
    return f"{line}; still frozen: {', '.join(sorted(now))}" if now else line


class Freeze:
    """Which parameters of a model belong to which part, and which of them move at a step.

    last: the last step, counted from 0; what stands still there does so throughout. It begins
    there, so that an optimizer made next holds only what will move. Parameters that did not learn
    before never will. Raises E202 for a part that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment | None,
        freeze: Mapping[str, int],
        *,
        last: int,
    ):
        self._freeze = {part: steps for part, steps in freeze.items() if steps}
        parts = _parts(model, attachment)
        self._names = {part: self._of(parts, part) for part in self._freeze}
        self._parameters = dict(model.named_parameters())
        self._learning = {n for n, p in self._parameters.items() if p.requires_grad}
        self._last, self._now = last, frozenset[str]()
        self.at(last)

    def at(self, step: int) -> None:
        """Let move what moves in the step after `step` others, and nothing else."""
        now = frozen_parts(step, self._freeze)
        if now == self._now:
            return
        before, after = self._still(self._now), self._still(now)
        for name in before ^ after:
            self._parameters[name].requires_grad_(name not in after)
        self._now = now

    def experts_move(self, step: int) -> bool:
        """Whether routed experts move in the step after `step` others."""
        return not frozen_parts(step, self._freeze) & {"experts", "all_but_router"}

    def experts_ever_move(self) -> bool:
        """Whether routed experts move at some step."""
        return self.experts_move(self._last)

    @torch.no_grad()
    def norms(self) -> Tensor | None:
        """Of each parameter that stands still throughout, float64; None when none does."""
        still = sorted(self._still(frozen_parts(self._last, self._freeze)))
        if not still:
            return None
        norms = [self._parameters[name].double().norm() for name in still]
        return torch.stack(norms).cpu()

    def _still(self, parts: frozenset[str]) -> set[str]:
        """The names of the learning parameters in any of some parts."""
        return {name for part in parts for name in self._names[part]} & self._learning

    def _of(self, parts: Mapping[str, Sequence[str]], part: str) -> Sequence[str]:
        if parts[part]:
            return parts[part]
        why = "a dense model has no router" if part != "attention" else "the model has none"
        fix = f"leave {part} out of optim.freeze"
        raise ExpertlyError("E202", f"optim.freeze.{part}", why, fix=fix)


def _parts(model: nn.Module, attachment: Attachment | None) -> dict[str, list[str]]:
    """The names of each part's parameters; tied ones have one."""
    layers = attachment.layers if attachment else []
    routers = {id(p) for layer in layers for p in layer.router.parameters()}
    experts = {id(p) for layer in layers for p in layer.experts.parameters()} - routers
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in routers]
    return {
        "experts": [name for name, p in others if id(p) in experts],
        "attention": [name for name, _ in others if _in_attention(name)],
        "all_but_router": [name for name, _ in others] if layers else [],
    }


def _in_attention(name: str) -> bool:
    """Whether a module around the parameter is attention; a norm before or after it is not."""
    modules = name.split(".")[:-1]
    return any(_ATTENTION.search(each) and "norm" not in each for each in modules)
