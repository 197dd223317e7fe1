"""A run's records, read and written: metrics.jsonl and router.jsonl, one JSON object a line."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError
from expertly.faults import strike
from expertly.folders import disk_error, save_file

METRICS, ROUTER = "metrics.jsonl", "router.jsonl"


def append_json(file: Path, record: dict[str, Any]) -> None:
    """Append one record as a line, whole or not at all. Raises E401 when the disk refuses."""
    line = _line(record).encode()
    try:
        with file.open("ab", buffering=0) as stream:
            before = stream.tell()
            strike("log.metrics", record.get("step"))
            try:
                written = stream.write(line)
            except OSError:
                stream.truncate(before)
                raise
            if written < len(line):  # a disk that was nearly full took a part
                stream.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise disk_error(file, error, need=len(line)) from error


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none when it is missing. A torn last line is left out.

    Raises E301 for any other line that is not a JSON object with a step.
    """
    if not file.is_file():
        return []
    whole = file.read_bytes().split(b"\n")[:-1]
    try:
        return [_record(line) for line in whole]
    except (ValueError, RecursionError) as error:
        fix = "take the lines out that are not JSON objects with a step"
        raise ExpertlyError("E301", str(file), f"is damaged ({error})", fix=fix) from error


def last_health(run: Path) -> dict[str, Any] | None:
    """The watch set that a run wrote down last; None before the first and for a dense model."""
    watched = [record["moe"] for record in read_records(run / METRICS) if "moe" in record]
    return watched[-1] if watched else None


def evaluated(run: Path, step: int) -> bool:
    """Whether a run has written an evaluation after this step down."""
    records = read_records(run / METRICS)
    return any(record["step"] == step and "eval" in record for record in records)


def forget_after(run: Path, step: int) -> None:
    """Take back what a run wrote down after the checkpoint that it resumes from."""
    for file in (run / METRICS, run / ROUTER):
        if file.exists():
            kept = [record for record in read_records(file) if record["step"] <= step]
            save_file(file, "".join(map(_line, kept)))


def finite(value: Any) -> Any:
    """A value for JSON, which has neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError(f"no object with a step: {line[:40]!r}")
    return record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record)) + "\n"
