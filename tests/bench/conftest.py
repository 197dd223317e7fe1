"""Small configs to measure."""

import json

import pytest

from expertly.models.build import model_config


@pytest.fixture
def raw(tiny_sizes):
    """raw(family, **sizes) -> a config.json as a dict."""

    def make(family, **sizes):
        given = tiny_sizes(family, **sizes)
        if family == "qwen3":  # dense
            given = {key: value for key, value in given.items() if "expert" not in key}
            given = {key: value for key, value in given.items() if key[:4] != "moe_"}
        return json.loads(model_config(family, given).to_json_string(use_diff=False))

    return make
