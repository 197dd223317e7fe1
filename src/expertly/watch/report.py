"""What a router's numbers mean: each beside what is healthy, and a picture of the load."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_BLOCKS = "▁▂▃▄▅▆▇█"


class Reading(NamedTuple):
    """One number of the watch set, in words."""

    name: str
    now: str
    healthy: str


def readings(watched: Mapping[str, Any]) -> list[Reading]:
    """The numbers of a watch set that a person looks at first."""
    return [
        Reading("dead experts", f"{watched['dead_frac']:.0%}", "0%"),
        Reading("load entropy", f"{watched['entropy_norm']:.3f}", "near 1"),
        Reading("effective experts", f"{watched['effective_experts']:.1f}", "most of them"),
        Reading("hottest expert", f"{watched['max_load_ratio']:.2f}x its share", "below 2x"),
        Reading("dropped tokens", f"{watched['dropped_frac']:.1%}", "0%"),
    ]


def spread(load: list[float], even: float | None = None) -> str:
    """A layer's load as one bar per expert; half height is an even share.

    even: what an even share is; None: the loads are shares of 1.
    """
    even = even or 1 / len(load)
    return "".join(_BLOCKS[min(7, int(share / even * 4))] for share in load)
