"""Are a run's records such as its history reads? What is not is E301, in one line. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError

_MOST = 1e100  # of any number, so that no arithmetic on it overflows
_ALARM: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: isinstance(value, str),
    "layer": lambda value: _count(value),
    "experts": lambda value: isinstance(value, list) and all(map(_count, value)),
    "figure": lambda value: value is None or _number(value),
    "limit": lambda value: value is None or _number(value),
    "what": lambda value: isinstance(value, str),
    "advice": lambda value: isinstance(value, str),
}


def check_router(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Loads, gate masses, norms and domains: all (layers, experts) as in the first load.

    Raises E301.
    """
    loads = [record["load"] for record in records if "load" in record]
    if not loads:
        return
    first = loads[0]
    sound = isinstance(first, list) and first and isinstance(first[0], list) and first[0]
    layers, experts = (len(first), len(first[0])) if sound else (0, 0)
    form = f"{layers} rows of {experts}"
    for record in records:
        for name, of in (("load", _share), ("mass", _share_or_none), ("norms", _norm_or_none)):
            fits = name not in record or _rows(record[name], layers, experts, of)
            _demand(fits and experts > 0, file, record, name, f"is not {form} numbers")
        if "load" in record:
            _demand(_count(record.get("tokens")), file, record, "tokens", "is not a count")
        per_layer, domains = record.get("layers", {}), record.get("domains", {})
        fits = isinstance(per_layer, dict) and _rows(list(per_layer.values()), None, layers, _any)
        _demand(fits, file, record, "layers", f"is not {layers} numbers for each name")
        fits = isinstance(domains, dict) and all(
            _rows(rows, layers, experts, _share) for rows in domains.values()
        )
        _demand(fits, file, record, "domains", f"is not {form} shares for each domain")


def check_metrics(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The watch set is numbers; an alarm says everything; what clears it is an object.

    Raises E301.
    """
    for record in records:
        moe, alarm = record.get("moe", {}), record.get("alarm")
        fits = isinstance(moe, dict) and all(map(_any, moe.values()))
        _demand(fits, file, record, "moe", "is not a number for each name")
        if "alarm" in record:
            fits = isinstance(alarm, dict) and _count(alarm.get("step", 0))
            fits = fits and all(test(alarm.get(name)) for name, test in _ALARM.items())
            _demand(fits, file, record, "alarm", f"is not an object of {', '.join(_ALARM)}")
        fits = isinstance(record.get("cleared", {}), dict)
        _demand(fits, file, record, "cleared", "is not an object of kind, layer")


def _demand(fits: bool, file: Path, record: Mapping[str, Any], name: str, why: str) -> None:
    if not fits:
        what = f"{file}, step {record['step']}"
        raise ExpertlyError("E301", what, f"{name} {why}", fix="take that line out")


def _rows(value: Any, rows: int | None, columns: int, test: Callable[[Any], bool]) -> bool:
    """Whether a value is so many rows of so many entries that pass a test; rows None: any."""
    if not isinstance(value, list) or len(value) != (len(value) if rows is None else rows):
        return False
    return all(isinstance(r, list) and len(r) == columns and all(map(test, r)) for r in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST  # NaN is not


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _any(value: Any) -> bool:
    return value is None or _number(value) or value != value  # old runs wrote NaN


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _share_or_none(value: Any) -> bool:
    return value is None or _share(value)


def _norm_or_none(value: Any) -> bool:
    return value is None or (_number(value) and value >= 0)
