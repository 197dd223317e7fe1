"""Are a run's records such as its history reads? What is not is E301, in one line. No torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError
from expertly.watch.records import finite

_MOST = 1e100  # of any number, so that no arithmetic on it overflows


class _Range(NamedTuple):
    """Which numbers a row may hold."""

    low: float
    high: float
    gaps: bool  # whether null is one of them


_COSINE = _Range(-1.001, 1.001, gaps=True)  # rounding
_SHARE, _MASS = _Range(0, 1, gaps=False), _Range(0, 1, gaps=True)
_NORM, _ANY = _Range(0, _MOST, gaps=True), _Range(-_MOST, _MOST, gaps=True)


def check_router(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Loads, gate masses, norms and domains: all (layers, experts) as in the first load.

    Raises E301.
    """
    first: Any = next((record["load"] for record in records if "load" in record), None)
    layers = len(first) if isinstance(first, list) else 0
    experts = len(first[0]) if layers and isinstance(first[0], list) else 0
    form = f"not {layers} rows of {experts} numbers"
    for record in records:
        for name, allowed in (("load", _SHARE), ("mass", _MASS), ("norms", _NORM)):
            fits = name not in record or _is_table(record[name], layers, experts, allowed)
            _demand(fits and (first is None or experts > 0), file, record, name, form)
        _demand("load" not in record or _count(record.get("tokens")), file, record, "tokens")
        domains = record.get("domains", {})
        fits = isinstance(domains, dict) and (
            first is None  # then nothing is told of them
            or all(_is_table(rows, layers, experts, _SHARE) for rows in domains.values())
        )
        _demand(fits, file, record, "domains", form)
        for name, allowed in (("layers", _ANY), ("divergence", _COSINE)):
            rows = record.get(name, {})
            fits = isinstance(rows, dict) and (
                first is None or all(_is_table([row], 1, layers, allowed) for row in rows.values())
            )
            _demand(fits, file, record, name, f"not {layers} numbers each")


def check_metrics(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The watch set is numbers; an alarm says everything; what clears it is an object.

    Raises E301.
    """
    for record in records:
        moe = record.get("moe", {})
        # old runs wrote NaN
        fits = isinstance(moe, dict) and _is_row(finite(list(moe.values())), _ANY)
        _demand(fits, file, record, "moe", "not a number each")
        alike = record.get("divergence", {})
        fits = isinstance(alike, dict) and _is_row(list(alike.values()), _COSINE)
        _demand(fits, file, record, "divergence", "not a cosine each")
        _demand("alarm" not in record or _is_alarm(record["alarm"]), file, record, "alarm")
        _demand(isinstance(record.get("cleared", {}), dict), file, record, "cleared")


def _demand(
    fits: bool, file: Path, record: Mapping[str, Any], name: str, why: str = "not whole"
) -> None:
    if not fits:
        what = f"{file}, step {record['step']}"
        raise ExpertlyError("E301", what, f"{name} is damaged ({why})", fix="take that line out")


def _is_alarm(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    experts = value.get("experts")
    return (
        all(isinstance(value.get(name), str) for name in ("kind", "what", "advice"))
        and _count(value.get("layer"))
        and _count(value.get("step", 0))
        and isinstance(experts, list)
        and all(map(_count, experts))
        and _is_row([value.get("figure"), value.get("limit")], _ANY)
    )


def _is_table(value: Any, rows: int, columns: int, allowed: _Range) -> bool:
    """Whether a value is so many rows of so many numbers."""
    if not isinstance(value, list) or len(value) != rows:
        return False
    return all(isinstance(r, list) and len(r) == columns and _is_row(r, allowed) for r in value)


def _is_row(row: list[Any], allowed: _Range) -> bool:
    """Whether all of a row are numbers in a range; by built-ins, because long runs have many."""
    known = [each for each in row if each is not None] if allowed.gaps else row
    if not known:
        return True
    if not set(map(type, known)) <= {int, float}:  # True is neither
        return False
    within = allowed.low <= min(known) and max(known) <= allowed.high
    return within and not math.isnan(sum(known))  # min and max may pass a NaN by


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST
