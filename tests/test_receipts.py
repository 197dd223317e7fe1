"""Receipts: written in one rename, read back equal, and a failed check exits 1."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.receipts import (
    RECEIPT,
    Check,
    Receipt,
    fingerprint,
    read,
    require,
    versions,
    write,
)

GOOD = Receipt(
    job="train",
    inputs={"data": "abc"},
    versions={"python": "3.11"},
    changed={"router": ["gate.weight"]},
    checks=(Check("finite weights", True), Check("twin", True, 0.004, 0.01)),
    figures={"loss": 2.5},
)
BAD = replace(GOOD, checks=(*GOOD.checks, Check("experts moved", False, 0, "more than 0")))


def refused(code: str, call, *arguments) -> ExpertlyError:
    with pytest.raises(ExpertlyError) as caught:
        call(*arguments)
    assert caught.value.code == code
    assert caught.value.exit_code == int(code[1])
    return caught.value


def test_written_and_read_back(tmp_path):
    path = write(GOOD, tmp_path / "out")
    assert path == tmp_path / "out" / "receipt.json"
    assert read(tmp_path / "out") == GOOD
    assert json.loads(path.read_text())["verdict"] == "pass"
    assert os.listdir(tmp_path / "out") == [RECEIPT]


def test_a_newer_receipt_replaces_the_older(tmp_path):
    write(GOOD, tmp_path)
    write(BAD, tmp_path)
    assert read(tmp_path) == BAD
    assert os.listdir(tmp_path) == [RECEIPT]


values = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
values = values.filter(lambda value: value not in (math.inf, -math.inf))
records = st.dictionaries(st.text(), values | st.lists(values, max_size=2), max_size=3)
checks = st.builds(
    Check, name=st.text(), passed=st.booleans(), figure=values, limit=values, fix=st.text()
)


@given(
    receipt=st.builds(
        Receipt,
        job=st.text(),
        inputs=records,
        versions=records,
        changed=records,
        checks=st.lists(checks, max_size=3).map(tuple),
        figures=records,
    )
)
@settings(max_examples=50, deadline=None)
def test_round_trip(receipt, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "receipt"
    write(receipt, folder)
    assert read(folder) == receipt
    assert receipt.verdict == ("pass" if all(check.passed for check in receipt.checks) else "fail")


def test_what_json_cannot_say_becomes_text_or_a_plain_number(tmp_path):
    figures = {"nan": math.nan, "inf": -math.inf, "path": Path("/a"), 3: (1,)}
    figures |= {"numpy": np.float32(0.5), "flag": np.bool_(True), "nan32": np.float32("nan")}
    checks = (Check("bias", np.float64(1) < np.float64(2)),)
    path = write(replace(GOOD, figures=figures, checks=checks), tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read(tmp_path).figures == {
        "nan": "nan", "inf": "-inf", "path": "/a", "3": [1],
        "numpy": 0.5, "flag": True, "nan32": "nan",
    }  # fmt: skip
    assert read(tmp_path).checks[0].passed is True


def test_require_names_the_first_failed_check(tmp_path):
    require(GOOD, tmp_path)
    error = refused("E101", require, BAD, tmp_path)
    assert str(error) == (
        "error[E101] experts moved: failed with 0, limit more than 0."
        f" FIX: read {tmp_path / RECEIPT}"
    )
    bare = replace(GOOD, checks=(Check("sealed", False),))
    assert "sealed: failed with none, limit none." in str(refused("E101", require, bare, tmp_path))


def test_require_says_what_to_do_where_the_check_knows(tmp_path):
    told = replace(GOOD, checks=(Check("idle", False, 3, 0, "train longer"),))
    error = refused("E101", require, told, tmp_path)
    assert str(error).endswith(f"FIX: train longer; figures in {tmp_path / RECEIPT}")
    write(told, tmp_path)
    assert read(tmp_path) == told


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("[]", "is not a JSON object"),
        ("{}", "is not a receipt"),
        ('{"checks": 3}', "is not a receipt"),
        ('{"checks": [{"nam": 1}]}', "is not a receipt"),
        ('{"checks": [], "job": "train"}', "is not a receipt"),
    ],
)
def test_a_damaged_receipt(tmp_path, text, why):
    (tmp_path / RECEIPT).write_text(text)
    assert why in str(refused("E301", read, tmp_path))


def test_a_receipt_whose_verdict_was_edited(tmp_path):
    path = write(BAD, tmp_path)
    path.write_text(path.read_text().replace('"verdict": "fail"', '"verdict": "pass"'))
    assert "says 'pass', its checks say fail" in str(refused("E301", read, tmp_path))


def test_a_missing_receipt_and_a_folder_that_cannot_be(tmp_path):
    refused("E301", read, tmp_path)
    (tmp_path / "file").write_text("")
    refused("E401", write, GOOD, tmp_path / "file")


def test_versions_import_nothing():
    found = versions("numpy", "no-such-package")
    assert list(found) == ["python", "expertly", "numpy", "no-such-package"]
    assert found["numpy"] == np.__version__
    assert found["no-such-package"] == "not installed"
    code = (
        "import sys; from expertly.receipts import versions; versions('torch', 'numpy');"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fingerprint_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_fingerprint_of_a_folder_sees_names_and_contents_only(tmp_path):
    def folder(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return fingerprint(tmp_path / name)

    first = folder("one", {"a": "1", "b/c": "2"})
    assert folder("two", {"b/c": "2", "a": "1"}) == first
    assert folder("three", {"a": "1", "b/c": "3"}) != first
    assert folder("four", {"a": "1", "b/d": "2"}) != first
    assert folder("five", {"a": "1", "b/c": "2", "d": ""}) != first


def test_fingerprint_of_what_cannot_be_read(tmp_path):
    error = refused("E301", fingerprint, tmp_path / "no")
    assert "cannot be read (no such file or directory)" in str(error)
    (tmp_path / "dangling").symlink_to("nowhere")
    refused("E301", fingerprint, tmp_path)
