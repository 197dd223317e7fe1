"""The report as one HTML page: page.html with its style, its scripts and the report's JSON in it.

The page draws itself from that JSON, so its numbers are those of `expertly watch --json`. It is
whole: no other file, no request. What the report says is data: here it is only embedded safely.
"""

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

_SCRIPTS = ("page.js", "charts.js", "sections.js")  # in this order


def page(report: Mapping[str, Any]) -> str:
    """The page, as text for a UTF-8 file; hostile names in the report stay text."""
    # neither an end tag nor a comment can begin; json itself escapes all but ASCII
    data = json.dumps(report, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title = str(report["title"]).encode("utf-8", "replace").decode("utf-8")
    parts = {
        "title": html.escape(title),
        "report": data,
        "style": _file("page.css"),
        "script": "".join(map(_file, _SCRIPTS)),
    }
    # in one pass: a title that looks like a placeholder is not filled in
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def _file(name: str) -> str:
    return resources.files("expertly.watch").joinpath(name).read_text(encoding="utf-8")
