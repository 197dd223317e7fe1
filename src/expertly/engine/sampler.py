"""Which token comes next: the likeliest, or one drawn from the nucleus."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertly.errors import ExpertlyError

_UNLIKELY = 1e-3  # of the likeliest token's probability; a nucleus is rarely wider


class Sampling(NamedTuple):
    """How the next token is chosen; temperature 0 takes the most likely one."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def check_sampling(sampling: Sampling) -> None:
    """Raise E202 for a temperature or top_p below 0 or that is not a number."""
    for name in ("temperature", "top_p"):
        value = getattr(sampling, name)
        if not (math.isfinite(value) and value >= 0):
            why = f"it is {value}, expected a number from 0 up"
            usual = Sampling._field_defaults[name]
            raise ExpertlyError("E202", name, why, fix=f"the usual {name} is {usual}")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The id of the next token, of logits (vocab,). generator: on the CPU."""
    if sampling.temperature == 0:
        return likeliest(logits)
    logits = logits.float()
    probs = ((logits - logits.max()) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p >= 1:
        return _drawn(probs.cumsum(dim=0), generator)
    kept, ids = nucleus(probs, sampling.top_p)
    return int(ids[_drawn(kept.cumsum(dim=0), generator)])


def likeliest(logits: Tensor) -> int:
    """The id of the largest of logits (vocab,), the first of equal ones."""
    if logits.device.type == "cpu":  # there torch takes 20 times as long as numpy
        return int(logits.float().numpy().argmax())
    return int(logits.argmax())


def nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens that reach top_p together: their probabilities and ids.

    At least one (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, section 3.1). probs:
    (vocab,). Few tokens are likely at all, and only those are sorted: a whole vocabulary takes
    longer than a small model's step.
    """
    ids = (probs >= probs.max() * _UNLIKELY).nonzero().squeeze(1)
    kept = probs[ids]
    if kept.sum() < top_p:
        kept, ids = probs, torch.arange(len(probs), device=probs.device)
    kept, order = kept.sort(descending=True, stable=True)
    size = 1 + int((kept.cumsum(dim=0)[:-1] < top_p).sum())
    return kept[:size], ids[order[:size]]


def penalized(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits (vocab,) of tokens seen before made less likely, by a factor on either side of 0.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1.
    """
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    old = logits[ids]
    return logits.index_put((ids,), torch.where(old < 0, old * penalty, old / penalty))


def _drawn(total: Tensor, generator: torch.Generator) -> int:
    """A place in cumulated weights, each as likely as its weight."""
    point = torch.rand(1, generator=generator).to(total.device) * total[-1]
    return min(int(torch.searchsorted(total, point, right=True)), len(total) - 1)
