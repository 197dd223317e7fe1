"""Amounts as people write and read them: "24GB", "14.8T"; 24 GB, 12.9 B."""

import re

from expertly.errors import ExpertlyError

_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e([0-9]{1,2}))?\s*([A-Za-z]*)\s*")
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {
    "": 1e9,  # a bare number of bytes is nobody's memory: it means GB
    **{f"{prefix}b": 10.0**power for prefix, power in zip("kmgt", (3, 6, 9, 12), strict=True)},
    **{f"{prefix}ib": 1024.0**power for power, prefix in enumerate("kmgt", start=1)},
}
_LARGEST = 1e18  # more bytes, or tokens, than there are


def bytes_of(text: str, flag: str) -> float:
    """Bytes of "24GB", "16GiB" or "24", which means GB. Raises E208 for anything else, or none."""
    return _amount(text, flag, _BYTES, "24GB")


def count_of(text: str, flag: str) -> float:
    """The number in "14.8T", "2.788M" or "3e9". Raises E208 for anything else, or zero."""
    return _amount(text, flag, _COUNTS, "1.5T")


def number(value: float) -> str:
    """Three digits, without powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gb(size: float) -> str:
    """Bytes in GB."""
    return f"{number(size / 1e9)} GB"


def billions(parameters: float) -> str:
    """Parameters."""
    return f"{parameters / 1e9:.3g} B"


def _amount(text: str, flag: str, units: dict[str, float], example: str) -> float:
    found = _AMOUNT.fullmatch(text)
    unit = found and units.get(found[3].lower())
    value = float(found[1]) * 10.0 ** int(found[2] or 0) * unit if found and unit else 0.0
    if not 0 < value < _LARGEST:
        raise ExpertlyError("E208", flag, f"{text[:40]!r} is no amount", fix=f"write {example}")
    return value
