"""A run's records, read and written: metrics.jsonl and router.jsonl, one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError
from expertly.folders import disk_error, save_file

METRICS, ROUTER = "metrics.jsonl", "router.jsonl"


def append_json(file: Path, record: dict[str, Any]) -> None:
    """Append one record as a line. Raises E401 when the disk refuses."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(_line(record))
    except OSError as error:
        raise disk_error(file, error) from error


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none when it is missing. A torn last line is left out.

    Raises E301 for any other line that is not JSON.
    """
    if not file.is_file():
        return []
    whole = file.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        fix = "take the lines out that are not JSON"
        raise ExpertlyError("E301", str(file), f"is damaged ({error})", fix=fix) from error


def last_health(run: Path) -> dict[str, Any] | None:
    """The watch set that a run wrote down last; None before the first and for a dense model."""
    watched = [record["moe"] for record in read_records(run / METRICS) if "moe" in record]
    return watched[-1] if watched else None


def forget_after(run: Path, step: int) -> None:
    """Take back what a run wrote down after the checkpoint that it resumes from."""
    for file in (run / METRICS, run / ROUTER):
        if file.exists():
            kept = [record for record in read_records(file) if record["step"] <= step]
            save_file(file, "".join(map(_line, kept)))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
