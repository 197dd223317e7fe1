"""What a router's numbers mean: each beside what is healthy, and a picture of the load."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_BLOCKS = "▁▂▃▄▅▆▇█"


# ranges that healthy runs keep to at every step, chance included; alarms judge more closely
_READINGS = (
    ("dead_frac", "experts without a token", "{:.0%}", "near 0%"),
    ("entropy_norm", "load entropy", "{:.3f}", "above 0.8"),
    ("effective_experts", "effective experts", "{:.1f}", "most of them"),
    ("max_load_ratio", "hottest expert", "{:.2f}x its share", "below 4x"),
    ("dropped_frac", "dropped tokens", "{:.1%}", "near 0%"),
    ("cosine_to_each_other", "experts alike (cosine)", "{:.4f}", "below 1"),
    ("cosine_to_dense", "like the dense model", "{:.4f}", "below 1"),
)


class Reading(NamedTuple):
    """One number of the watch set, in words."""

    name: str
    now: str
    healthy: str


def readings(watched: Mapping[str, Any]) -> list[Reading]:
    """The numbers of a watch set that a person looks at first; those that it knows."""
    return [
        Reading(words, form.format(watched[name]), healthy)
        for name, words, form, healthy in _READINGS
        if watched.get(name) is not None
    ]


def spread(load: list[float], even: float | None = None) -> str:
    """A layer's load as one bar per expert; half height is an even share.

    even: what an even share is; None: the loads are shares of 1.
    """
    even = even or 1 / len(load)
    return "".join(_BLOCKS[min(7, int(share / even * 4))] for share in load)
