"""The figures that papers and model pages give, each within its margin."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_tables


@pytest.mark.parametrize("line", plan_tables.LINES, ids=lambda line: line.what)
def test_a_plan_says_what_was_published(line):
    assert plan_tables.planned(line) == pytest.approx(line.published, rel=line.margin)
