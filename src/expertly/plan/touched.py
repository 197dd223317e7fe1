"""How many different experts a batch of tokens needs: with it grows what a step has to read."""

from math import sqrt


def experts_touched(experts: int, top_k: int, tokens: float) -> float:
    """How many distinct experts a layer reads for `tokens` tokens, on average.

    E (1 - (1 - k/E)^B), for tokens that choose apart from each other, every expert equally often.
    Real routers are less even and touch fewer.
    """
    return experts * (1 - _missed(experts, top_k) ** tokens) if experts else 0.0


def touched_spread(experts: int, top_k: int, tokens: float) -> float:
    """The standard deviation of that count, in experts; exact for such tokens.

    From the chance that one expert is missed by all of them, and that two are.
    """
    if experts < 2:
        return 0.0
    one = _missed(experts, top_k) ** tokens
    both = (_missed(experts, top_k) * max(experts - top_k - 1, 0) / (experts - 1)) ** tokens
    return sqrt(max(experts * one * (1 - one) + experts * (experts - 1) * (both - one * one), 0.0))


def _missed(experts: int, top_k: int) -> float:
    return 1 - top_k / experts
