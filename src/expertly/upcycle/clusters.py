"""Balanced k-means: as many clusters as copies, each with as many tokens as the others."""

import torch
from torch import Tensor

from expertly.errors import ExpertlyError

_ROUNDS = 12


def balanced_clusters(states: Tensor, copies: int, *, seed: int) -> Tensor:
    """The cluster of each token, (tokens,): sizes differ by one at most.

    states: (tokens, dim). The starts are spread out as in k-means++; then rounds of a balanced
    assignment and new means. The same for the same seed. Raises E202 for fewer tokens than copies.
    """
    if len(states) < copies:
        why = f"{len(states)}, fewer than {copies} clusters"
        raise ExpertlyError("E202", "tokens", why, fix="give more text")
    x = (states - states.mean(dim=0)).float()
    centres = _spread_out(x, copies, torch.Generator().manual_seed(seed))
    labels = torch.zeros(len(x), dtype=torch.long)
    for _ in range(_ROUNDS):
        before = labels
        labels = _assign(torch.cdist(x, centres).square())
        if labels.equal(before):
            break
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        centres = sums / labels.bincount(minlength=copies).unsqueeze(1)
    return labels


def _spread_out(x: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Starting centres: each next one is drawn by its squared distance to those before it."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    nearest = torch.full((len(x),), torch.inf)
    for _ in range(copies - 1):
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(dim=1))
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
    return x[chosen]


def _assign(costs: Tensor) -> Tensor:
    """Cheap clusters (tokens, copies) -> (tokens,) of even sizes.

    Those with most to lose choose first: by how much dearer their second choice would be. A full
    cluster is passed over.
    """
    tokens, copies = costs.shape
    best = costs.topk(min(2, copies), largest=False, sorted=True).values
    order = (best[:, 0] - best[:, -1]).argsort(stable=True).tolist()
    wishes = costs.argsort(dim=1, stable=True).tolist()
    least, spare = divmod(tokens, copies)  # so many clusters may have one more
    sizes, labels = [0] * copies, [0] * tokens
    for token in order:
        cluster = next(c for c in wishes[token] if sizes[c] < least + (spare > 0))
        spare -= sizes[cluster] == least
        sizes[cluster] += 1
        labels[token] = cluster
    return torch.tensor(labels)
