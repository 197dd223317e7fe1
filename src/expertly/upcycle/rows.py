"""Rows for a new router: drawn at random, or fitted so that they tell kinds of tokens apart.

A stock router has no bias: a token's logits are its state times the rows.
"""

import torch
from torch import Tensor

# of the states' mean square: on SmolLM2's states more new tokens go right than with 0.01, and
# clusters come out more even than with 1
_RIDGE = 0.1
_NOTHING = 1e-6  # a spread of logits that is rounding alone, where 1 is wanted
_CLEAR = 0.5  # share of its own tokens that a copy should rank first for
_CHUNK = 1024  # tokens in float64 at once


def random_rows(copies: int, dim: int, *, seed: int, std: float = 0.02) -> Tensor:
    """Small normal rows (copies, dim), as models are initialised: nearly even weights."""
    return std * torch.randn(copies, dim, generator=torch.Generator().manual_seed(seed))


def fitted_rows(states: Tensor, wanted: Tensor) -> Tensor:
    """Rows (copies, dim) whose logits come nearest to what is wanted, by ridge regression.

    states: (tokens, dim), what the router will see; wanted: (tokens, copies), 1 for a token that a
    copy should get, -1 for one that it should not, else 0; what is wanted of each copy weighs the
    same, however many tokens say it. The states of a normed residual stream share a large mean
    direction, which serves as the bias that a stock router lacks. Scaled so that the logits, which
    differ from token to token by a common number that routing ignores, spread by 1 around their
    mean over the copies; all zero where the states tell nothing apart.
    """
    gram, wishes = _moments(states, wanted)
    ridge = _RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
    gram.diagonal().add_(ridge)
    rows = torch.linalg.solve(gram, wishes).T
    logits = torch.cat([chunk.double() @ rows.T for chunk in states.split(_CHUNK)])
    spread = (logits - logits.mean(dim=1, keepdim=True)).std(correction=0)
    return (rows / spread if spread > _NOTHING else torch.zeros_like(rows)).float()


def _moments(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted states' products with each other and with what is wanted, in float64:
    (dim, dim) and (dim, copies)."""
    dim, copies = states.shape[1], wanted.shape[1]
    gram = torch.zeros(dim, dim, dtype=torch.double)
    wishes = torch.zeros(dim, copies, dtype=torch.double)
    parts = (each.split(_CHUNK) for each in (_even(wanted), states, wanted))
    for weight, x, y in zip(*parts, strict=True):
        x = weight.sqrt().unsqueeze(1) * x.double()
        y = weight.sqrt().unsqueeze(1) * (y - y.mean(dim=1, keepdim=True)).double()
        gram.addmm_(x.T, x)
        wishes.addmm_(x.T, y)
    return gram, wishes


def _even(wanted: Tensor) -> Tensor:
    """Weights (tokens,) by which each copy's wanted and unwanted tokens count 1 together."""
    signs = torch.cat([wanted > 0, wanted < 0], dim=1).double()
    return (signs / signs.sum(dim=0).clamp(min=1)).sum(dim=1)


def unclear(rows: Tensor, states: Tensor, wanted: Tensor) -> list[int]:
    """The copies that most of their own tokens do not rank first: their texts are too alike.

    rows (copies, dim), states and wanted as fitted_rows takes them.
    """
    first = (states @ rows.T).argmax(dim=1)
    shares = [(first[own] == copy).float().mean() for copy, own in enumerate((wanted > 0).T)]
    return [copy for copy, share in enumerate(shares) if not share > _CLEAR]
