"""A job's settings: frozen keyword-only dataclasses, filled from YAML and dotted overrides.

`load` reads the file, puts `key=value` overrides on top, checks names and types, and builds. Fields
may be bool, int, float (finite), str, Any, Literal, another such dataclass, `X | None`,
`tuple[X, ...]`, `tuple[X, Y]` or `dict[str, X]`; one without a default is required. A section given
in part keeps the rest of its default; a list or a free mapping replaces it.

Ranges belong to the dataclass. It may have one method, `problems(self) -> Iterator[(leaf, why)]`,
which runs once all its types are right. The first problem becomes E202 under its dotted name. An
outer dataclass may have it too, for what its sections decide together; it then yields dotted leaves
(`router.top_k`).
"""

import difflib
import json
import math
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from expertly.errors import ExpertlyError, nearest

T = TypeVar("T")
Kind = Any  # what a field's annotation may be: a type, a union, a Literal
# PyYAML lets more than its own error through: `!!bool x`, a 13th month, 2,000 open brackets
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "quoted text"}


def load(kind: type[T], path: Path | str | None, overrides: Sequence[str] = ()) -> T:
    """Build a config of `kind` from a YAML file (None: no file) and `key=value` overrides.

    Raises E201 for an unknown key, E202 for a value that is missing, of the wrong type or out of
    range, E203 for a file that cannot be read, E208 for an override that names no single key.
    """
    return build(kind, {} if path is None else _read(Path(path)), overrides)


def build(kind: type[T], given: Mapping[str, object], overrides: Sequence[str] = ()) -> T:
    """Build a config of `kind` from a mapping as YAML would give it. Raises E201, E202 and E208."""
    tree, names = dict(given), tuple(_names(kind))
    for override in overrides:
        tree = _apply(tree, override, names)
    return cast(T, _build(kind, tree, _Place("", names)))


def dump(config: object) -> str:
    """The config as YAML, every field in declared order; `load` reads it back as an equal one."""
    # without allow_unicode, with which PyYAML loses "\x85"
    return yaml.dump(asdict(cast(Any, config)), Dumper=_Dumper, sort_keys=False, width=sys.maxsize)


def differences(a: object, b: object) -> list[str]:
    """One line for each leaf that differs: `optim.learning_rate: 0.001 -> 0.0003`."""
    old, new = dict(_leaves(asdict(cast(Any, a)))), dict(_leaves(asdict(cast(Any, b))))
    names = [*old, *(name for name in new if name not in old)]
    pairs = [(name, old.get(name, MISSING), new.get(name, MISSING)) for name in names]
    return [f"{name}: {_text(was)} -> {_text(now)}" for name, was, now in pairs if was != now]


def _leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf as (dotted name, value); only lists of mappings are entered."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        yield from _leaves(dict(enumerate(value)), prefix)
    else:
        yield prefix, value


def _text(value: object) -> str:
    text = "unset" if value is MISSING else json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else json.dumps(value, default=str)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:index]):
                problem = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(cast(Any, node), deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would take for a number."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """A float; 1e3, without a dot, is the whole number 1000, so that an int field may take it."""
    value = loader.construct_yaml_float(node)
    return int(value) if "." not in node.value and value.is_integer() else value


# YAML 1.1 wants a dot and a sign (1.0e-4); people write 1e-4 and 1.5e4
_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"
_Loader.add_constructor(_FLOAT, _number)
_Loader.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def _read(path: Path) -> dict:
    """The file's mapping; an empty file is an empty one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        why = str(error.strerror).lower()
        raise ExpertlyError("E203", str(path), why, fix="name a YAML file") from error
    tree = _parse(content, "E203", str(path))
    if isinstance(tree, dict | None):
        return tree or {}
    fix = "write it as lines of key: value"
    raise ExpertlyError("E203", str(path), f"holds {_shown(tree)}, not a mapping", fix=fix)


def _parse(content: str | bytes, code: str, what: str) -> object:
    """YAML as Python values; an error of this code, with the line when PyYAML knows it."""
    try:
        return yaml.load(content, Loader=_Loader)
    except _BAD_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark and code == "E203" else ""
        why = f"{where}not YAML ({' '.join(str(getattr(error, 'problem', None) or error).split())})"
        raise ExpertlyError(code, what, why, fix="correct it, or quote the text") from error


def _names(kind: Kind, prefix: str = "") -> Iterator[str]:
    """The dotted names of all sections and leaves, except inside lists and free mappings."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        for arm in (hint, *get_args(hint)):
            if is_dataclass(arm) and get_origin(hint) not in (tuple, dict):
                yield from _names(arm, f"{prefix}{name}.")


def _apply(tree: dict, override: str, known: Sequence[str]) -> dict:
    """The tree with one `key=value` on top; an unknown key goes in too, for `_build` to report."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        fix = "write it as optim.learning_rate=1e-4"
        raise ExpertlyError("E208", _shown(override), "is not key=value", fix=fix)
    homes = [key] if key in known else [name for name in known if name.endswith(f".{key}")]
    if len(homes) > 1:
        why = f"could be {' or '.join(homes)}"
        raise ExpertlyError("E208", key, why, fix="write one of them in full")
    name = homes[0] if homes else key
    return cast(dict, _put(tree, name.split("."), _parse(text, "E208", _shown(override)), name))


def _put(tree: object, path: Sequence[str], value: object, name: str) -> object:
    """A copy of the tree with a value at the path; YAML anchors share branches, so no mutation."""
    if not path:
        return value
    head, *rest = path
    if isinstance(tree, list) and head in map(str, range(len(tree))):
        index = int(head)
        return [*tree[:index], _put(tree[index], rest, value, name), *tree[index + 1 :]]
    if tree is not None and not isinstance(tree, dict):
        raise _wrong(name.removesuffix("." + ".".join(path)), tree, f"something that holds {head}")
    branch = tree or {}
    return {**branch, head: _put(branch.get(head), rest, value, name)}


@dataclass(frozen=True)
class _Place:
    """Where in the config we are, and every name that there is, for hints."""

    name: str
    known: Sequence[str]

    def below(self, key: object) -> "_Place":
        shown = key if isinstance(key, str) and key.isprintable() else repr(key)
        return _Place(f"{self.name}.{shown}" if self.name else shown, self.known)


def _build(kind: Kind, given: object, at: _Place, base: object = None) -> object:
    """A dataclass from a mapping, over the values of `base` or else the class's defaults."""
    given = {} if given is None else given  # a section whose lines are all commented out
    if not isinstance(given, dict):
        raise _wrong(at.name, given, "a mapping")
    hints, own = get_type_hints(kind), [field.name for field in fields(kind)]
    for key in given:
        if key not in own:
            fix = _nearest_name(str(key), at, own)
            raise ExpertlyError("E201", at.below(key).name, "unknown key", fix=fix)
    config = kind(**{f.name: _field(f, hints, given, at.below(f.name), base) for f in fields(kind)})
    for leaf, why in getattr(config, "problems", tuple)():
        name = at.below(leaf).name
        raise ExpertlyError("E202", name, why, fix=f"change {name}")
    return config


def _field(field: Field, hints: dict, given: dict, at: _Place, base: object) -> object:
    """The value of one field: given, or by default, or missing."""
    kind = hints[field.name]
    made = field.default if field.default_factory is MISSING else field.default_factory()
    default = getattr(base, field.name, made)
    if field.name in given:
        return _value(kind, given[field.name], at, default)
    if default is not MISSING:
        return default
    if is_dataclass(kind):
        return _build(kind, {}, at)
    raise ExpertlyError("E202", at.name, "required and missing", fix=f"set {at.name}")


def _nearest_name(key: str, at: _Place, here: Sequence[str]) -> str:
    """The fix for an unknown key: the same name elsewhere, or the nearest here, or anywhere."""
    leaves = {name.rpartition(".")[2]: name for name in at.known}
    if key in leaves:
        return f"write {' or '.join(n for n in at.known if f'.{n}'.endswith(f'.{key}'))}"
    for names in ({name: at.below(name).name for name in here}, leaves):
        if close := difflib.get_close_matches(key, names, n=1):
            return f"write {names[close[0]]}"
    return nearest(key, here)


def _value(kind: Kind, given: object, at: _Place, default: object = None) -> object:
    """What was given, as the kind that the field declares."""
    origin = get_origin(kind) or kind
    if is_dataclass(kind):
        return _build(kind, given, at, default if type(default) is kind else None)
    if origin in (Union, types.UnionType):
        return _either(kind, given, at, default)
    if kind is Any:
        return given
    convert = {Literal: _choice, tuple: _sequence, dict: _mapping}.get(origin, _scalar)
    return convert(kind, given, at)


def _either(kind: Kind, given: object, at: _Place, default: object) -> object:
    """The first arm of a union that takes the value."""
    arms = [arm for arm in get_args(kind) if arm is not type(None)]
    if given is None and len(arms) < len(get_args(kind)):
        return None
    # an exact type goes first, so that 2 stays whole in `float | int`
    *others, last = sorted(arms, key=lambda arm: type(given) is arm, reverse=True)
    for arm in others:
        with suppress(ExpertlyError):
            return _value(arm, given, at, default)
    return _value(last, given, at, default)


def _choice(kind: Kind, given: object, at: _Place) -> object:
    options = get_args(kind)
    if (type(given), given) in [(type(option), option) for option in options]:  # 1 == True
        return given
    why = f"got {_shown(given)}, expected {' or '.join(map(str, options))}"
    raise ExpertlyError("E202", at.name, why, fix=nearest(str(given), map(str, options)))


def _sequence(kind: Kind, given: object, at: _Place) -> tuple:
    arms = get_args(kind)
    if not isinstance(given, list):
        raise _wrong(at.name, given, "a list")
    kinds = arms[:1] * len(given) if arms[-1] is Ellipsis else arms
    if len(kinds) != len(given):
        raise _wrong(at.name, given, f"a list of {len(kinds)}")
    places = [at.below(str(index)) for index in range(len(given))]
    return tuple(map(_value, kinds, given, places))


def _mapping(kind: Kind, given: object, at: _Place) -> dict:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise _wrong(at.name, given, "a mapping whose keys are text")
    return {key: _value(get_args(kind)[1], item, at.below(key)) for key, item in given.items()}


def _scalar(kind: Kind, given: object, at: _Place) -> object:
    assert kind in _WORDS, f"{at.name} declares {kind}, which no YAML value is"
    if kind is float and type(given) is int and abs(given) <= sys.float_info.max:
        return float(given)
    if type(given) is not kind or (isinstance(given, float) and not math.isfinite(given)):
        raise _wrong(at.name, given, _WORDS[kind])
    return given


def _wrong(name: str, given: object, expected: str) -> ExpertlyError:
    why = f"got {_shown(given)}, expected {expected}"
    return ExpertlyError("E202", name, why, fix=f"set {name} to {expected}")


def _shown(value: object) -> str:
    """What was given, short and on one line."""
    text = "a list" if isinstance(value, list) else _text(value)
    text = "a mapping" if isinstance(value, dict) else text
    return text if len(text) <= 60 else f"{text[:57]}..."
