"""The `data` section as a user writes it."""

from dataclasses import asdict

import pytest

from expertly.config import load
from expertly.data.config import DataConfig, Source
from expertly.errors import ExpertlyError


def test_a_section_from_yaml(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text(
        "sources:\n- {path: stdlib, weight: 0.5}\n- {path: valid.jsonl, eval: true}\n"
        "sequence_length: 128\n"
    )
    config = load(DataConfig, file)
    first, second = Source(path="stdlib", weight=0.5), Source(path="valid.jsonl", eval=True)
    assert config.sources == (first, second)
    assert config.sequence_length == 128
    assert asdict(config)["eval_fraction"] == 0.05


def test_a_misspelt_key_of_a_source_is_refused(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text("sources:\n- {path: stdlib, wieght: 1}\n")
    with pytest.raises(ExpertlyError, match=r"error\[E201\].*weight"):
        load(DataConfig, file)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("sources", "[]"),
        ("sequence_length", "1"),
        ("vocab_size", "256"),
        ("eval_fraction", "1.0"),
        ("eval_fraction", "-0.1"),
        ("eval_fraction", "0.004"),  # would round to no document at all
        ("eval_fraction", "0.055"),
        ("eval_tokens", "1"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(leaf, value):
    with pytest.raises(ExpertlyError, match=rf"error\[E202\] {leaf}.*must"):
        load(DataConfig, None, ["sources=[{path: stdlib}]", f"{leaf}={value}"])


@pytest.mark.parametrize("percent", range(100))
def test_every_whole_percent_can_be_held_out(percent):
    given = ["sources=[{path: stdlib}]", f"eval_fraction={percent / 100}"]
    assert load(DataConfig, None, given).eval_fraction == percent / 100
    assert not list(
        DataConfig(sources=(Source(path="a"),), eval_fraction=0.01 * percent).problems()
    )
