"""docs/plan.md and README.md show what their commands print; the page names every key of the JSON.

Write the outputs again with: python tests/plan/test_plan_docs.py
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plan.md"
PAGES = (PAGE, ROOT / "README.md")
SHOWN = re.compile(r"^```\n\$ ((?:expertly plan|python benchmarks).*)\n(?:.*\n)*?```$", re.M)
MEASURED = "--measure"  # other machines, other times


def printed(command: str) -> str:
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(places)}
    words = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.rstrip("\n")


def refreshed(page: str) -> str:
    def again(block: re.Match[str]) -> str:
        if MEASURED in block[1]:
            return block[0]
        return f"```\n$ {block[1]}\n{printed(block[1])}\n```"

    return SHOWN.sub(again, page)


def keys(answer: object) -> Iterator[str]:
    """Every key of an answer; of what lies under the name of a part, the part is none."""
    if isinstance(answer, list):
        answer = answer[0] if answer else None
        yield from keys(answer)
    elif isinstance(answer, dict):
        for key, value in answer.items():
            yield key
            parts = value.values() if key in ("by_part", "bytes_by_part") else [value]
            yield from keys(next(iter(parts)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_shows_what_its_commands_print(page):
    text = page.read_text()
    assert SHOWN.findall(text)
    assert refreshed(text) == text


def test_every_key_of_the_json_is_on_the_page():
    command = "expertly plan mixtral-8x7b --vs llama-2-70b --offload pcie4 --ep 2 --json"
    found = set(keys(json.loads(printed(command))))
    page = PAGE.read_text()
    assert len(found) > 60
    assert not {key for key in found if not re.search(rf"`([a-z_]+\.)?{key}[`.]", page)}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
