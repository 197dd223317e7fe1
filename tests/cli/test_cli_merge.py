"""expertly merge: flags, the page, the JSON."""

import json
import re

import pytest
import torch

from expertly.folders import save_folder
from expertly.models.adapter_files import save_adapter
from expertly.models.adapters import AdapterSpec, add_adapter
from expertly.models.loading import load_weights


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    base = tiny_folder("qwen3_moe")
    model = load_weights(base)
    add_adapter(model, AdapterSpec(r=2, lora_alpha=4.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    target = tmp_path_factory.mktemp("made") / "adapter"
    return save_folder(target, lambda into: save_adapter(model, into, base=base))


def test_the_page(cli, adapter, tiny_folder, tmp_path):
    target = tmp_path / "whole"
    code, out, err = cli("merge", adapter, target)
    assert code == 0, err
    base = re.escape(str(tiny_folder("qwen3_moe")))
    for line in (
        rf"^merged        experts 4, attention 8 weights of {base}$",
        r"^logits        folded in [\de.-]+, rounding 0, written [\de.-]+; the largest is [\d.]+$",
        rf"^folder        {re.escape(str(target))}$",
        rf"^talk to it    \S*expertly generate {re.escape(str(target))} --chat$",
    ):
        assert re.search(line, out, re.M), (line, out)
    assert re.search(r"^folded in: logits differ by [\de.-]+; writing torch.float32$", err, re.M)


def test_json(cli, adapter, tiny_folder, tmp_path):
    base = tiny_folder("qwen3_moe")
    code, out, _ = cli("merge", adapter, tmp_path / "whole", "--base", base, "--json")
    said = json.loads(out)
    assert code == 0 and said["base"] == str(base)
    assert said["adapters"] == {"experts": 4, "attention": 8, "router": 0}


def test_an_error_is_one_line(cli, tiny_folder, tmp_path):
    code, out, err = cli("merge", tiny_folder("qwen3_moe"), tmp_path / "whole")
    assert (code, out) == (3, "") and not (tmp_path / "whole").exists()
    assert re.fullmatch(r"expertly: error\[E305\] .*: holds no adapter\. FIX: .*\n", err), err


@pytest.mark.parametrize("verb", ["generate", "watch"])
def test_an_adapter_is_read_as_a_model(verb, cli, adapter, tiny_tokenizer, tmp_path):
    """By its base, and with the tokenizer that lies beside it."""
    tiny_tokenizer.save_pretrained(adapter)
    more = {
        "generate": ("--prompt", "the cat", "--max-new-tokens", 2, "--json"),
        "watch": ("--data", "stdlib:code", "--tokens", 64, "--json"),
    }
    code, out, err = cli(verb, adapter, *more[verb])
    assert code == 0, err
    assert json.loads(out)
