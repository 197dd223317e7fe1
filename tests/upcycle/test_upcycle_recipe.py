"""Recipes in mergekit-moe's words: what is read, and one line for everything else."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.upcycle.recipe import Recipe, Specialist, read_recipe

LAW = {"source_model": "law", "positive_prompts": ["the court"], "negative_prompts": ["def f():"]}
CODE = {"source_model": "code", "positive_prompts": ["def f():", "import os"]}
SAID = {"base_model": "base", "experts": [LAW, CODE]}


def without(expert, *keys):
    return {key: value for key, value in expert.items() if key not in keys}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a folder of each model."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "law", "code"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def read(home):
    """read(keys) -> the recipe of a file that says so."""

    def make(said):
        file = home / "recipe.yaml"
        file.write_text(said if isinstance(said, str) else yaml.safe_dump(said))
        return read_recipe(file)

    return make


def refused(read, said):
    """The one error that a recipe ends with."""
    with pytest.raises(ExpertlyError) as error:
        read(said)
    assert "\n" not in str(error.value)
    return error.value


def test_all_that_is_said_is_read(read, home):
    said = {**SAID, "gate_mode": "hidden", "dtype": "bfloat16", "experts_per_token": 1}
    assert read({**said, "architecture": "qwen3", "backbone": "average"}) == Recipe(
        base=home / "base",
        specialists=(
            Specialist(home / "law", ("the court",), ("def f():",)),
            Specialist(home / "code", ("def f():", "import os"), ()),
        ),
        gate_mode="hidden",
        top_k=1,
        dtype="bfloat16",
        backbone="average",
        shared=False,
        target="qwen3_moe",
    )


def test_what_is_left_out_is_as_mergekit_does(read):
    recipe = read(SAID)
    assert (recipe.gate_mode, recipe.backbone, recipe.shared) == ("hidden", "base", False)
    assert (recipe.top_k, recipe.dtype, recipe.target) == (None, None, "")


def test_keys_without_a_value_are_left_out(read):
    empty = ("dtype", "experts_per_token", "shared_experts", "architecture", "tokenizer_source")
    assert read({**SAID, **dict.fromkeys(empty)}) == read(SAID)
    assert not read({**SAID, "experts": [{**LAW, "negative_prompts": None}, CODE]}).specialists[0][
        2
    ]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("hidden", "hidden"),
        ("hidden_avg", "hidden"),
        ("hidden_last", "hidden"),
        ("random", "random"),
        ("uniform_random", "random"),
    ],
)
def test_gate_modes(read, said, meant):
    assert read({**SAID, "gate_mode": said}).gate_mode == meant


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_gates_need_no_prompts(read, mode):
    experts = [without(LAW, "positive_prompts"), {**CODE, "positive_prompts": [""]}]
    assert read({**SAID, "gate_mode": mode, "experts": experts}).specialists[0].positive == ()


@pytest.mark.parametrize(
    ("said", "target"), [("mixtral", "mixtral"), ("qwen", "qwen2_moe"), ("qwen3", "qwen3_moe")]
)
def test_architectures(read, said, target):
    assert read({**SAID, "architecture": said}).target == target


@pytest.mark.parametrize("name", ["base", "./base", "base/"])
def test_the_base_may_be_the_shared_expert(read, name):
    assert read({**SAID, "shared_experts": [{"source_model": name, "residual_scale": 1}]}).shared


@pytest.mark.parametrize(
    "said",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": "base_model"},
        {"tokenizer": {"source": "base"}},
        {"tokenizer": {"source": "base_model"}},
    ],
)
def test_the_tokenizer_may_be_named_if_it_is_the_base_models(read, home, said):
    (home / "base_model").mkdir(exist_ok=True)
    assert read({**SAID, "base_model": "base_model", **said}).base == home / "base_model"


def test_scales_that_change_nothing_are_read(read):
    assert read({**SAID, "experts": [{**LAW, "noise_scale": 0, "residual_scale": 1.0}, CODE]})


def test_folders_are_relative_to_the_file_and_else_to_here(read, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("law", "elsewhere"):
        Path(name).mkdir()
    recipe = read({**SAID, "base_model": str(home / "base"), "experts": [LAW, LAW]})
    assert (recipe.base, recipe.specialists[0].source) == (home / "base", home / "law")
    assert read({**SAID, "base_model": "elsewhere"}).base == Path("elsewhere")


def test_a_file_named_without_a_folder(read, home, monkeypatch):
    read(SAID)
    monkeypatch.chdir(home)
    assert read_recipe(Path("recipe.yaml")).base == Path("base")


WRONG = [
    ("E201", {"base_modle": "base"}, "base_modle: unknown key. FIX: write base_model"),
    (
        "E201",
        {"experts": [{**LAW, "postive_prompts": []}, CODE]},
        "experts.0.postive_prompts: unknown key. FIX: write experts.0.positive_prompts",
    ),
    ("E202", {"base_model": None}, "base_model"),
    ("E202", {"base_model": " "}, "base_model: is empty"),
    ("E202", {"base_model": 7}, "base_model: got 7, expected quoted text"),
    ("E202", {"experts": None}, "experts"),
    ("E202", {"experts": {}}, "experts: got a mapping, expected a list"),
    ("E202", {"experts": []}, "experts: must list at least two"),
    ("E202", {"experts": [LAW]}, "experts: must list at least two"),
    ("E202", {"experts": ["law", "code"]}, "experts.0"),
    ("E202", {"experts": [without(LAW, "source_model"), CODE]}, "experts.0.source_model: required"),
    ("E202", {"experts": [{**LAW, "source_model": ""}, CODE]}, "experts.0.source_model: is empty"),
    ("E202", {"experts": [LAW, {**CODE, "positive_prompts": "def"}]}, "experts.1.positive_prompts"),
    ("E202", {"experts": [LAW, {**CODE, "positive_prompts": [1]}]}, "experts.1.positive_prompts.0"),
    ("E202", {"experts": [LAW, without(CODE, "positive_prompts")]}, "hidden needs some"),
    ("E202", {"experts": [LAW, {**CODE, "positive_prompts": []}]}, "hidden needs some"),
    ("E202", {"experts": [LAW, {**CODE, "positive_prompts": ["a", " "]}]}, "has an empty prompt"),
    ("E202", {"experts": [LAW, {**CODE, "negative_prompts": [""]}]}, "has an empty prompt"),
    ("E202", {"experts": [{**LAW, "noise_scale": 0.1}, CODE]}, "give --noise for all experts"),
    ("E202", {"experts": [{**LAW, "residual_scale": 0.5}, CODE]}, "experts.0.residual_scale"),
    ("E202", {"gate_mode": "cheap_embed"}, "cheap_embed routes by words alone"),
    ("E202", {"gate_mode": "hiden"}, "write hidden"),
    ("E202", {"dtype": "float8"}, "dtype"),
    ("E202", {"experts_per_token": 0}, "experts_per_token: must be from 1 to 2"),
    ("E202", {"experts_per_token": 3}, "experts_per_token: must be from 1 to 2"),
    ("E202", {"experts_per_token": "two"}, "experts_per_token"),
    ("E202", {"architecture": "deepseek"}, "architecture"),
    ("E202", {"backbone": "mean"}, "backbone"),
    ("E202", {"shared_experts": [{"source_model": "law"}]}, "only the base model itself"),
    ("E202", {"shared_experts": [{"source_model": "base"}] * 2}, "only the base model itself"),
    ("E202", {"shared_experts": [{**LAW, "source_model": "base"}]}, "must have no prompts"),
    ("E202", {"tokenizer_source": "union"}, "tokenizer_source: is the base model; leave it out"),
    ("E202", {"tokenizer": {"source": "union"}}, "tokenizer: is the base model's; leave it out"),
    ("E305", {"base_model": "owner/dense"}, "no such folder. FIX: hf download owner/dense"),
    ("E305", {"base_model": "../dense"}, "no such folder. FIX: correct it"),
    ("E305", {"base_model": "recipe.yaml"}, "no such folder"),
    ("E305", {"base_model": "x" * 5000}, "no such folder"),
    ("E305", {"base_model": "x\0y"}, "no such folder"),
    ("E305", {"experts": [LAW, {**CODE, "source_model": "gone"}]}, "recipe.yaml: gone"),
]


@pytest.mark.parametrize(("code", "change", "line"), WRONG)
def test_anything_else_is_one_line(read, code, change, line):
    error = refused(read, {**SAID, **change})
    assert error.code == code
    assert line in str(error)


@pytest.mark.parametrize("said", ["", "base_model: base", "experts: []"])
def test_a_missing_key_is_named(read, said):
    assert "required and missing" in str(refused(read, said))


@pytest.mark.parametrize(
    "said", ["[1, 2]", "base_model: [", "a: 1\na: 2", "\0", "!!python/name:os"]
)
def test_what_is_no_yaml_mapping_is_unreadable(read, said):
    assert refused(read, said).code == "E203"


def test_a_file_that_is_not_there_is_unreadable(tmp_path):
    with pytest.raises(ExpertlyError) as error:
        read_recipe(tmp_path / "none.yaml")
    assert error.value.code == "E203"


KEYS = ["base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture"]
KEYS += ["shared_experts", "tokenizer", "tokenizer_source", "backbone", "nonsense"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    LEAVES | st.sampled_from([LAW, CODE, "base", "random", "hidden"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(LAW)) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_value_is_read_or_refused_in_one_line(read, change):
    try:
        read({**SAID, **change})
    except ExpertlyError as error:
        assert error.code in ("E201", "E202", "E203", "E305")
        assert len(str(error).splitlines()) == 1


@given(st.data())
def test_a_mangled_file_is_read_or_refused(home, data):
    whole = yaml.safe_dump(SAID).encode()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    file = home / "mangled.yaml"
    file.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:])
    try:
        read_recipe(file)
    except ExpertlyError as error:
        assert error.code in ("E201", "E202", "E203", "E305")
        assert len(str(error).splitlines()) == 1
    finally:
        os.unlink(file)
