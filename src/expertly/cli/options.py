"""What several verbs share: the --json flag and how results are printed."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from expertly.watch.records import finite

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(result: Any) -> None:
    """A result for machines, on stdout; null for a number that JSON cannot say."""
    typer.echo(json.dumps(finite(result), indent=2, default=str))


def command() -> str:
    """How this program is called from here: its name, or its path where the shell lacks it."""
    if shutil.which("expertly"):
        return "expertly"
    return os.path.relpath(Path(sys.executable).with_name("expertly"))


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first row as the head; the first column is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def number(count: float) -> str:
    """A count for people: 1.5 T, 1.78 B, 12.3 M, 4,096."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= 0.9995 * size:  # what rounds up to it, too
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f}"
