"""Configs: what load accepts, how it refuses, and that dump is its inverse."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.config import build, differences, dump, load
from expertly.errors import ExpertlyError


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Data:
    sources: tuple[Source, ...] = ()
    columns: tuple[str, ...] = ("text",)
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str
    twin: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Router:
    kind: Literal["topk", "sigmoid"] = "topk"
    num_experts: int = 8
    top_k: int = 2
    weights: dict[str, float] = field(default_factory=dict)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.top_k > self.num_experts:
            yield "top_k", f"is {self.top_k}, more than num_experts = {self.num_experts}"


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_steps: int = 10
    save_steps: int | float | Literal["epoch"] = 5


@dataclass(frozen=True, kw_only=True)
class Eval:
    path: str | None = None
    every: int = 5


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    data: Data = Data()
    router: Router = Router()
    optim: Optim = field(default_factory=lambda: Optim(weight_decay=0.1))
    eval: Eval | None = None
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.eval and self.eval.every > self.optim.max_steps:
            yield "eval.every", f"is {self.eval.every}, past optim.max_steps"


BASE = Run(model=Model(path="m"))


def run(*overrides: str) -> Run:
    return load(Run, None, ["model.path=m", *overrides])


def refusal(call, *arguments) -> str:
    with pytest.raises(ExpertlyError) as caught:
        call(*arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def from_text(tmp_path, text: str) -> Run:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return load(Run, tmp_path / "run.yaml")


# --- what it accepts


def test_a_mapping_is_built_as_the_same_yaml_would_be(tmp_path):
    given = {"model": {"path": "m"}, "optim": {"betas": [0.9, 0.1]}, "seed": 3}
    config = build(Run, given)
    assert config == from_text(tmp_path, "{model: {path: m}, optim: {betas: [0.9, 0.1]}, seed: 3}")
    assert given == {"model": {"path": "m"}, "optim": {"betas": [0.9, 0.1]}, "seed": 3}
    assert "E201" in refusal(build, Run, {"model": {"path": "m"}, "sed": 3})
    assert "E202" in refusal(build, Run, {"model": {"path": "m"}, "seed": "3"})
    assert "E202" in refusal(build, Run, {})
    wrong = {"model": {"path": "m"}, "router": {"top_k": 9}}
    assert "router.top_k: is 9, more than num_experts = 8" in refusal(build, Run, wrong)


def test_file_and_overrides(tmp_path):
    text = """
    model: {path: m, twin: yes}
    data:
      sources:
        - path: a
        - {path: b, weight: 2}
    optim:
      learning_rate: 3e-4
      betas: [0.9, 1e-1]
    router:   # all defaults
    """
    (tmp_path / "run.yaml").write_text(text)
    config = load(Run, str(tmp_path / "run.yaml"), ["optim.learning_rate=1e-4", "seed=3"])
    assert config == Run(
        model=Model(path="m", twin=True),
        data=Data(sources=(Source(path="a"), Source(path="b", weight=2.0))),
        optim=Optim(learning_rate=1e-4, betas=(0.9, 0.1), weight_decay=0.1),
        seed=3,
    )
    assert isinstance(config.data.sources[1].weight, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate=1e-4", replace(BASE, optim=replace(BASE.optim, learning_rate=1e-4))),
        ("learning_rate=1.5E4", replace(BASE, optim=replace(BASE.optim, learning_rate=15000.0))),
        ("learning_rate=-.5e3", replace(BASE, optim=replace(BASE.optim, learning_rate=-500.0))),
        ("learning_rate=3", replace(BASE, optim=replace(BASE.optim, learning_rate=3.0))),
        ("max_steps=1e3", replace(BASE, optim=replace(BASE.optim, max_steps=1000))),
        ("save_steps=epoch", replace(BASE, optim=replace(BASE.optim, save_steps="epoch"))),
        ("optim={max_steps: 7}", replace(BASE, optim=replace(BASE.optim, max_steps=7))),
        ("cache=~", BASE),
        ("cache='1e3'", replace(BASE, data=Data(cache="1e3"))),
        ("eval.every=7", replace(BASE, eval=Eval(every=7))),
        ("eval=null", BASE),
        ("columns=[a, b]", replace(BASE, data=Data(columns=("a", "b")))),
        ("router.weights.a=1", replace(BASE, router=Router(weights={"a": 1.0}))),
    ],
)
def test_overrides(override, expected):
    assert run(override) == expected


def test_a_union_keeps_the_exact_type():
    assert type(run("save_steps=2").optim.save_steps) is int
    assert type(run("save_steps=0.5").optim.save_steps) is float


def test_free_mappings_hold_anything_but_never_a_number_as_text():
    config = run("model.arguments.rms_norm_eps=1e-6", "model.arguments.rope.type=yarn")
    assert config.model.arguments == {"rms_norm_eps": 1e-6, "rope": {"type": "yarn"}}


def test_a_list_element_may_be_overridden(tmp_path):
    text = "model: {path: m}\ndata: {sources: [{path: a}, {path: b}]}"
    (tmp_path / "run.yaml").write_text(text)
    config = load(Run, tmp_path / "run.yaml", ["data.sources.1.path=c"])
    assert [source.path for source in config.data.sources] == ["a", "c"]


def test_an_override_does_not_reach_through_a_yaml_anchor(tmp_path):
    text = "model: {path: m}\ndata: {sources: [&one {path: a}, *one]}"
    (tmp_path / "run.yaml").write_text(text)
    config = load(Run, tmp_path / "run.yaml", ["data.sources.1.path=c"])
    assert [source.path for source in config.data.sources] == ["a", "c"]


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load(Optim, tmp_path / "run.yaml") == Optim()


# --- how it refuses


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.learnin_rate=1", "optim.learnin_rate: unknown key. FIX: write optim.learning_rate"),
        ("learnin_rate=1", "learnin_rate: unknown key. FIX: write optim.learning_rate"),
        ("model.top_k=1", "model.top_k: unknown key. FIX: write router.top_k"),
        ("optm.max_steps=1", "optm: unknown key. FIX: write optim"),
        ("zzz=1", "zzz: unknown key. FIX: choose one of data, eval, model, optim, router, seed"),
        ("data.sources=[{pth: a}]", "data.sources.0.pth: unknown key. FIX: write data.sources.0."),
        ("data={1: 2}", "data.1: unknown key. FIX: choose one of cache, columns, sources"),
        ('data={"a\\nb": 2}', "data.'a\\nb': unknown key. FIX: choose one of"),
    ],
)
def test_unknown_key(override, text):
    assert refusal(run, override).startswith(f"error[E201] {text}")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("learning_rate=fast", 'optim.learning_rate: got "fast", expected a finite number'),
        ("learning_rate=true", "optim.learning_rate: got true, expected a finite number"),
        ("learning_rate=.nan", "optim.learning_rate: got NaN, expected a finite number"),
        ("learning_rate=1e999", "optim.learning_rate: got Infinity, expected a finite number"),
        ("learning_rate=", "optim.learning_rate: got null, expected a finite number"),
        ("learning_rate={a: 1}", "optim.learning_rate: got a mapping, expected a finite number"),
        (f"learning_rate=1{'0' * 400}", "optim.learning_rate: got 1000"),
        ("max_steps=10.0", "optim.max_steps: got 10.0, expected an integer"),
        ("max_steps=true", "optim.max_steps: got true, expected an integer"),
        ("max_steps=1e-3", "optim.max_steps: got 0.001, expected an integer"),
        ("twin=1", "model.twin: got 1, expected true or false"),
        (
            "model.path=12",
            "model.path: got 12, expected quoted text. FIX: set model.path to quoted",
        ),
        (
            "router.kind=topk_",
            'router.kind: got "topk_", expected topk or sigmoid. FIX: write topk',
        ),
        ("columns=text", 'data.columns: got "text", expected a list'),
        ("columns=[a, 1]", "data.columns.1: got 1, expected quoted text"),
        ("betas=[0.9]", "optim.betas: got a list, expected a list of 2"),
        ("router.weights={1: 2}", "router.weights: got a mapping, expected a mapping whose keys"),
        ("router.weights={a: b}", 'router.weights.a: got "b", expected a finite number'),
        ("model.arguments=3", "model.arguments: got 3, expected a mapping"),
        ("data=3", "data: got 3, expected a mapping"),
        ("data.sources=[{weight: 1}]", "data.sources.0.path: required and missing"),
        ("save_steps=often", 'optim.save_steps: got "often", expected epoch'),
        (f"save_steps={'x' * 999}", f'optim.save_steps: got "{"x" * 56}..., expected epoch'),
        ("router.top_k=9", "router.top_k: is 9, more than num_experts = 8. FIX: change router."),
        ("eval.every=11", "eval.every: is 11, past optim.max_steps. FIX: change eval.every"),
    ],
)
def test_wrong_value(override, text):
    assert refusal(run, override).startswith(f"error[E202] {text}")


def test_a_missing_value():
    assert refusal(load, Run, None) == (
        "error[E202] model.path: required and missing. FIX: set model.path"
    )


@pytest.mark.parametrize(
    "overrides",
    [("seed=1", "seed.x=2"), ("optim=3", "optim.max_steps=1"), ("columns=[a]", "data.columns.1=b")],
    ids=["leaf", "section", "past the end"],
)
def test_nothing_is_set_below_a_value_that_cannot_hold_it(overrides):
    assert "expected something that holds" in refusal(run, *overrides)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("seed", '"seed": is not key=value. FIX: write it as optim.learning_rate=1e-4'),
        ("=3", '"=3": is not key=value'),
        ("path=x", "path: could be model.path or eval.path. FIX: write one of them in full"),
        ("seed=[1", "\"seed=[1\": not YAML (expected ',' or ']'"),
        ("seed=2024-13-45", '"seed=2024-13-45": not YAML (month must be in 1..12)'),
    ],
)
def test_wrong_override(override, text):
    assert refusal(load, Run, None, [override]).startswith(f"error[E208] {text}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: [", "line 2: not YAML (expected the node content"),
        ("seed: 1\nmodel: {path: m}\nseed: 2\n", "line 3: not YAML (seed is given twice)"),
        ("a: *x", "line 1: not YAML (found undefined alias"),
        ("a: !!python/object:os.system x", "line 1: not YAML (could not determine a constructor"),
        ("a: !!bool x", "not YAML ('x')"),
        ("a: !!timestamp x", "not YAML ("),
        ("a: !!int ''", "not YAML ("),
        ("a: 2024-13-45", "not YAML (month must be in 1..12)"),
        ("[" * 2000, "not YAML (maximum recursion depth"),
        ("a: \x07", "not YAML ("),
        ("- a\n- b", "holds a list, not a mapping. FIX: write it as lines of key: value"),
        ("false", "holds false, not a mapping"),
    ],
)
def test_unreadable_file(tmp_path, text, why):
    found = refusal(from_text, tmp_path, text)
    assert found.startswith(f"error[E203] {tmp_path / 'run.yaml'}: {why}")


def test_missing_file_and_wrong_encoding(tmp_path):
    missing = refusal(load, Run, tmp_path / "no.yaml")
    assert missing.startswith(f"error[E203] {tmp_path / 'no.yaml'}: no such file or directory. FIX")
    assert "is a directory" in refusal(load, Run, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xe9}")
    assert "not YAML" in refusal(load, Run, tmp_path / "latin.yaml")


# --- dump and differences

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# what YAML 1.1, or our own 1e3, would read as something else
traps = st.sampled_from(["1e-4", "1E3", "1_0", "0x1", "12:30", "2024-01-01", "yes", "null", "~"])
traps |= st.sampled_from(
    ["", "=", "#", "a: b", "- a", "*x", "é", "日本", "\ufeff", "\x85", "\u2028"]
)
words = texts | traps
numbers = st.floats(allow_nan=False, allow_infinity=False)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
runs = st.builds(
    Run,
    model=st.builds(
        Model,
        path=words,
        twin=st.booleans(),
        arguments=st.dictionaries(words, anything, max_size=3),
    ),
    data=st.builds(
        Data,
        sources=st.lists(st.builds(Source, path=words, weight=numbers), max_size=3).map(tuple),
        columns=st.lists(words, max_size=3).map(tuple),
        cache=st.none() | words,
    ),
    router=st.builds(
        Router,
        kind=st.sampled_from(["topk", "sigmoid"]),
        num_experts=st.integers(8),
        top_k=st.integers(max_value=8),
        weights=st.dictionaries(words, numbers, max_size=2),
    ),
    optim=st.builds(
        Optim,
        learning_rate=numbers,
        betas=st.tuples(numbers, numbers),
        max_steps=st.integers(5),
        save_steps=st.integers() | numbers | st.just("epoch"),
    ),
    eval=st.none() | st.builds(Eval, path=st.none() | words, every=st.integers(max_value=5)),
    seed=st.integers(),
)


@given(config=runs)
@settings(max_examples=150, deadline=None)
def test_dump_loads_back_as_an_equal_config(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump(config), encoding="utf-8")
    loaded = load(Run, path)
    assert loaded == config
    assert type(loaded.optim.save_steps) is type(config.optim.save_steps)
    assert differences(loaded, config) == []
    assert dump(loaded) == dump(config)


@given(text=st.text(max_size=60) | st.text("ab:{}[]-!&*'\"\n #e1.%|>?@`,", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_config_or_one_line(text):
    for override in (text, f"model.path={text}", f"model.arguments={text}"):
        try:
            load(Run, None, ["model.path=m", override])
        except ExpertlyError as error:
            assert error.code in ("E201", "E202", "E208")
            assert len(str(error).splitlines()) == 1


def test_dump_writes_every_field_in_declared_order():
    assert dump(Data(sources=(Source(path="a"),))) == (
        "sources:\n- path: a\n  weight: 1.0\ncolumns:\n- text\ncache: null\n"
    )


def test_differences_name_the_leaves():
    old = run("model.arguments={a: 1, b: 2}", "sources=[{path: a}]")
    new = run("learning_rate=3e-4", "model.arguments={a: 1}", "sources=[{path: b}]", "eval.every=1")
    assert differences(old, new) == [
        "model.arguments.b: 2 -> unset",
        'data.sources.0.path: "a" -> "b"',
        "optim.learning_rate: 0.001 -> 0.0003",
        "eval: null -> unset",
        "eval.path: unset -> null",
        "eval.every: unset -> 1",
    ]


def test_differences_ignore_how_a_number_is_written():
    assert differences(Optim(learning_rate=1), Optim(learning_rate=1.0)) == []
    assert differences(Optim(learning_rate=math.pi), Optim()) == [
        f"learning_rate: {math.pi} -> 0.001"
    ]
