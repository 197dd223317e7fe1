"""A job's receipt: `receipt.json` in its output folder, with what went in, what changed and proof.

A job ends with `write` and then `require`, so that a failed check leaves its figures on disk and
still exits 1. This file knows no job: it neither runs checks nor decides what they should be.
"""

import hashlib
import json
import math
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from expertly.errors import ExpertlyError
from expertly.folders import read_json, save_file, sha256

RECEIPT = "receipt.json"


@dataclass(frozen=True)
class Check:
    """One thing that the job proved or failed to prove, with the figure and its limit."""

    name: str
    passed: bool
    figure: str | float | int | None = None
    limit: str | float | None = None
    fix: str = ""  # what to do when it failed


@dataclass(frozen=True)
class Receipt:
    """What a job did: inputs with hashes, versions, changes on experts and router, checks."""

    job: str
    inputs: dict
    versions: dict
    changed: dict
    checks: tuple[Check, ...]
    figures: dict

    @property
    def verdict(self) -> str:
        """ "pass" when every check passed, else "fail"."""
        return "pass" if all(check.passed for check in self.checks) else "fail"


def write(receipt: Receipt, folder: Path) -> Path:
    """Write `receipt.json` into the folder in one rename, over an older one; returns its path.

    What JSON cannot say (a path, NaN) becomes text. Raises E401 when the disk refuses.
    """
    value = _plain({"verdict": receipt.verdict, **asdict(receipt)})
    return save_file(folder / RECEIPT, json.dumps(value, indent=2) + "\n")


def read(folder: Path) -> Receipt:
    """The folder's receipt; E301 when it is missing or damaged."""
    value = read_json(folder / RECEIPT)
    verdict = value.pop("verdict", None)
    try:
        checks = tuple(Check(**check) for check in value.pop("checks"))
        receipt = Receipt(**value, checks=checks)
    except (KeyError, TypeError) as error:
        raise _damaged(folder, "is not a receipt") from error
    if receipt.verdict != verdict:
        raise _damaged(folder, f"says {verdict!r}, its checks say {receipt.verdict}")
    return receipt


def require(receipt: Receipt, folder: Path) -> None:
    """Raise E101 for the first check that failed, if any. folder: where the receipt lies."""
    for check in receipt.checks:
        if not check.passed:
            why = f"failed with {_told(check.figure)}, limit {_told(check.limit)}"
            file = folder / RECEIPT
            fix = f"{check.fix}; figures in {file}" if check.fix else f"read {file}"
            raise ExpertlyError("E101", check.name, why, fix=fix)


def versions(*packages: str) -> dict[str, str]:
    """The versions of python, expertly and these packages, none of which is imported."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("expertly", *packages)
    }


def fingerprint(path: Path) -> str:
    """The sha256 of a file, or of a folder's sorted (relative name, sha256) pairs.

    Raises E301 for what cannot be read.
    """
    try:
        if not path.is_dir():
            return sha256(path)
        files = sorted(file for file in path.rglob("*") if not file.is_dir())
        pairs = [(file.relative_to(path).as_posix(), sha256(file)) for file in files]
    except OSError as error:
        why = f"cannot be read ({error.strerror})".lower()
        raise ExpertlyError("E301", str(path), why, fix="check the path") from error
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _damaged(folder: Path, why: str) -> ExpertlyError:
    return ExpertlyError("E301", str(folder / RECEIPT), why, fix="run the job again")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: object) -> object:
    """A value that JSON can say."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if getattr(value, "ndim", None) == 0:  # a numpy or torch number
        return _plain(value.item())  # type: ignore[attr-defined]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _told(figure: object) -> str:
    return "none" if figure is None else str(figure)
