"""Models by name: the configs that come with the package, a model folder, or a config.json."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from expertly.errors import ExpertlyError, nearest
from expertly.models.configs import read_config, read_config_file
from expertly.plan.reading import read_shape
from expertly.plan.shape import Shape

_NEITHER = "neither a folder, a file nor a built-in model"


@cache
def known() -> dict[str, dict[str, Any]]:
    """The built-in configs: what a released config.json says, as far as it is counted here."""
    return json.loads(Path(__file__).with_name("known.json").read_text(encoding="utf-8"))


def shape_of(name: str) -> Shape:
    """The Shape of a built-in config. Raises E305 for a name that there is not."""
    if name not in known():
        raise _unknown(name, _NEITHER)
    return read_shape(known()[name], name)


def config_of(target: str) -> tuple[str, dict[str, Any]]:
    """A name to call it by, and the config, of a built-in model, a folder or a config.json.

    Raises E305 for a target that is none of them or has an impossible value in it, E301 for a
    file that is no JSON object.
    """
    if target in known():
        return target, known()[target]
    path, why = Path(target), _NEITHER
    try:
        if path.is_file():
            name = path.parent.resolve().name if path.name == "config.json" else path.stem
            return name, read_config_file(path)
        if path.is_dir():
            return path.resolve().name, read_config(path)
    except OSError as error:  # no name that a file can have, or not ours to read
        why = f"{why} ({error.strerror})"
    if target.lower() in known():
        return target.lower(), known()[target.lower()]
    raise _unknown(target, why)


def _unknown(target: str, why: str) -> ExpertlyError:
    return ExpertlyError("E305", target[:100], why, fix=nearest(target[:100].lower(), known()))
