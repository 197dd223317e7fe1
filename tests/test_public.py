"""What a user reaches from the top, and that reaching for it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import expertly

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_neither_torch_nor_transformers():
    code = "import sys, expertly; print({'torch', 'transformers', 'yaml', 'rich'} & {*sys.modules})"
    assert python("-c", code).strip() == "set()"


def test_floor_0_imports_no_torch():
    rooms = "config, errors, families, folders, receipts"
    code = f"import sys; from expertly import {rooms}; print('torch' in sys.modules)"
    assert python("-c", code).strip() == "False"


@pytest.mark.parametrize("name", expertly.__all__)
def test_every_public_name_is_there(name):
    assert getattr(expertly, name).__name__ == name


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        expertly.modle  # noqa: B018


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example):
    assert python(str(example))
