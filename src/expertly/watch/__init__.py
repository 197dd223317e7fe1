"""Router health: what the true decisions say about each layer's experts."""

from typing import Any

__all__ = ["Watch"]


def __getattr__(name: str) -> Any:
    if name != "Watch":
        raise AttributeError(f"module 'expertly.watch' has no attribute {name!r}")
    # only now, because reading a run's records needs no torch
    from expertly.watch.health import Watch

    return Watch
