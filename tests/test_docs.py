"""What the documents promise stands in the code, and the other way round."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from expertly.config import load
from expertly.data.config import Source
from expertly.errors import CODES
from expertly.moe.routing import ROUTERS
from expertly.train.config import TrainConfig
from expertly.watch.stats import LayerCounts, watch_set

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def leaves(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.mark.parametrize("leaf", [*leaves(TrainConfig)])
def test_every_setting_is_documented(leaf):
    page = "router.md" if leaf.startswith("router.") else "train.md"
    assert f"`{leaf}`" in (DOCS / page).read_text()


def test_no_setting_is_documented_that_is_not_there():
    known = {*leaves(TrainConfig), "router.*", "log.*", "router.jsonl"}
    sections = {"model", "data", "router", "optim", "schedule", "eval", "log"}
    for page in ("train.md", "router.md"):
        said = re.findall(r"`([a-z]+\.[a-z_0-9*]+)`", (DOCS / page).read_text())
        assert {name for name in said if name.split(".")[0] in sections} <= known


def test_every_key_of_a_source_is_documented():
    page = (DOCS / "data.md").read_text()
    assert all(f"`{field.name}`" in page for field in fields(Source))


def test_every_router_and_every_watched_number_is_documented():
    import torch

    page = (DOCS / "router.md").read_text()
    ones = torch.ones(1, 2, dtype=torch.float64)
    counts = LayerCounts(ones, ones, ones, ones[:, 0], ones[:, 0], ones, ones[:, 0])
    assert all(f"`{name}`" in page for name in [*ROUTERS, *watch_set(counts)])


PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_alarm_is_documented():
    from expertly.watch.alarms import KINDS

    page = (DOCS / "watch.md").read_text()
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, flags=re.M)) == set(KINDS)


def test_the_error_page_lists_exactly_the_codes():
    listed = re.findall(r"^\| (E\d{3}) \| (.*) \|$", (DOCS / "errors.md").read_text(), flags=re.M)
    assert dict(listed) == CODES
    assert [code for code, _ in listed] == sorted(CODES)


@pytest.mark.parametrize("example", [*(ROOT / "examples").glob("*.yaml")], ids=lambda p: p.stem)
def test_every_example_config_loads(example):
    assert load(TrainConfig, example).data.sources


@pytest.mark.parametrize("code", CODES)
def test_every_error_has_a_test(code):
    here = Path(__file__).parent
    tests = "".join(path.read_text() for path in here.rglob("test_*.py") if path != Path(__file__))
    assert code in tests


@pytest.mark.parametrize("passed", [True, False])
def test_a_receipt_follows_its_schema(passed, tmp_path):
    import jsonschema

    from expertly import receipts

    schema = json.loads((DOCS / "receipt.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    needed = schema["allOf"][1]["then"]["properties"]
    receipt = receipts.Receipt(
        job="train",
        inputs=dict.fromkeys(needed["inputs"]["required"], "known"),
        versions=receipts.versions("torch"),
        changed={"experts": "8 of 8"},
        checks=(receipts.Check("experts moved", passed, 8, "more than 0"),),
        figures=dict.fromkeys(needed["figures"]["required"], float("nan")),
    )
    said = json.loads(receipts.write(receipt, tmp_path).read_text())
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check(said)
    assert not check({**said, "verdict": "fail" if passed else "pass"}), "checks decide"
    assert not check({**said, "more": 1})
    for key in said:
        assert not check({k: v for k, v in said.items() if k != key}), key
    assert not check({**said, "checks": [{**said["checks"][0], "passed": "yes"}]})


def test_the_tree_in_the_house_page_is_the_tree():
    page = (DOCS / "house.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "src/expertly").glob("*/__init__.py")}
    assert set(re.findall(r"^  ([a-z]+)/ ", page, flags=re.M)) == rooms


def test_the_house_page_names_every_file_of_floor_0():
    page = (DOCS / "house.md").read_text()
    files = {path.name for path in (ROOT / "src/expertly").glob("[a-z]*.py")}
    said = {"family_*.py" if name.startswith("family_") else name for name in files}
    assert all(name in page for name in said)
