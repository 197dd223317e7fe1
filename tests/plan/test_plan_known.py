"""Models by name, by folder and by file."""

import json

import pytest

from expertly.errors import ExpertlyError
from expertly.plan.known import config_of, known, shape_of
from expertly.plan.shape import total

# what the models' own pages say, in billions: total and active
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "llama-2-70b": (69, 69),
    "deepseek-v3": (671, 37.6),
    "deepseek-v2": (236, 21.4),
    "qwen3-30b-a3b": (30.5, 3.35),
    "qwen3-235b-a22b": (235, 22.2),
    "olmoe-1b-7b": (6.9, 1.3),
    "gpt-oss-120b": (116.8, 5.7),
    "phi-3.5-moe": (41.9, 6.6),
    "llama-3.2-1b": (1.24, 1.24),
    "gemma-2-27b": (27.2, 27.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_built_in_model_is_as_large_as_its_makers_say(name):
    count = total(shape_of(name))
    stored, active = PUBLISHED[name]
    assert count.total / 1e9 == pytest.approx(stored, rel=0.015)
    assert count.active / 1e9 == pytest.approx(active, rel=0.015)


def test_a_folder_and_its_file_are_the_same_model(tmp_path):
    config = known()["olmoe-1b-7b"]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "other.json").write_text(json.dumps(config))
    assert config_of(str(folder)) == ("mine", config)
    assert config_of(str(folder / "config.json")) == ("mine", config)
    assert config_of(str(folder / "other.json")) == ("other", config)


def test_a_name_may_be_written_large():
    assert config_of("Mixtral-8x7B")[0] == "mixtral-8x7b"


@pytest.mark.parametrize("ask", [config_of, shape_of])
def test_an_unknown_model_is_one_line_with_the_nearest_name(ask):
    with pytest.raises(ExpertlyError, match=r"E305.*nor a built-in model.*write mixtral-8x7b"):
        ask("mixtral-8x7")
