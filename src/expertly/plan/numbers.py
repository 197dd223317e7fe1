"""Whole numbers out of a config, or one line that says which is wrong."""

from collections.abc import Mapping
from typing import Any

from expertly.errors import ExpertlyError

_LARGEST = 2**31  # of any size: more is a typing error


def whole(
    config: Mapping[str, Any],
    key: str,
    *,
    default: int | None = None,
    least: int = 1,
    most: int = _LARGEST,
) -> int:
    """A size of a config; E305 for one that is no such number, or is missing without a default."""
    value = config.get(key, default)
    if type(value) is not int or not least <= value <= most:
        said = f"is {repr(value)[:40]}" if key in config else "is missing"
        raise wrong(f"{key} {said}, expected a whole number from {least} to {most}")
    return value


def wrong(why: str) -> ExpertlyError:
    """The E305 of a config."""
    return ExpertlyError("E305", "config.json", why, fix="correct config.json")
