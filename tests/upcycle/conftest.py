"""Tiny dense models of every make that is read, and folders with them."""

import re

import pytest
import torch

from expertly.folders import save_folder
from expertly.models.build import build_model, model_config
from expertly.models.loading import save_model

WORDS = "the cat and the dog see the red tree while another bird sings about rivers"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": 0,
}


@pytest.fixture(scope="session")
def dense_model():
    """dense_model(family, **keys) -> a random dense model in float32, norms and biases too."""

    def make(family: str, *, seed: int = 0, **keys):
        torch.manual_seed(seed)
        model = build_model(model_config(family, {**SIZES, **keys})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    return make


@pytest.fixture(scope="session")
def dense_folder(dense_model, tiny_tokenizer, tmp_path_factory):
    """dense_folder(family, **keys) -> a saved dense model with its tokenizer; leave it as it is."""
    made = {}

    def make(family: str, **keys):
        what = (family, repr(keys))
        if what not in made:
            model = dense_model(family, **keys)
            target = tmp_path_factory.mktemp("dense") / family
            made[what] = save_folder(
                target, lambda folder: save_model(model, folder, tokenizer=tiny_tokenizer)
            )
        return made[what]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of documents, some of which are held out."""
    folder = tmp_path_factory.mktemp("text")
    words = re.findall(r"\w+", WORDS)
    for number in range(60):
        order = [words[(number * 7 + i * i) % len(words)] for i in range(60)]
        (folder / f"{number}.txt").write_text(" ".join(order))
    return str(folder)


def config_of(folder, target, text, config):
    """The job's config; text of the tests' own unless it says other."""
    from expertly.config import build
    from expertly.upcycle.config import UpcycleConfig

    given = {"model": str(folder), "output_dir": str(target), "data": [text], "tokens": 256}
    return build(UpcycleConfig, {**given, **config})


@pytest.fixture
def upcycle_config(dense_folder, text, tmp_path):
    """upcycle_config(family or folder, **config) -> a config; dense keys go in `keys`."""

    def make(model, *, keys=None, out="moe", **config):
        folder = model if "/" in str(model) else dense_folder(model, **(keys or {}))
        return config_of(folder, tmp_path / out, text, config)

    return make


@pytest.fixture
def upcycle(upcycle_config):
    """upcycle(family or folder, **config) -> the result; dense keys go in `keys`."""
    from expertly.upcycle.run import run

    return lambda model, **config: run(upcycle_config(model, **config), lambda line: None)


@pytest.fixture(scope="session")
def upcycled(dense_folder, text, tmp_path_factory):
    """upcycled(family, **config) -> the result, made once; leave its folder as it is."""
    from expertly.upcycle.run import run

    made = {}

    def make(family, **config):
        what = (family, repr(config))
        if what not in made:
            target = tmp_path_factory.mktemp("moe") / "moe"
            config = config_of(dense_folder(family), target, text, config)
            made[what] = run(config, lambda line: None)
        return made[what]

    return make


@pytest.fixture(scope="session")
def prepared(dense_folder, text):
    """prepared(family, **config) -> the job, set up; dense keys go in `keys`."""
    from expertly.upcycle.setup import prepare

    def make(model, *, keys=None, **config):
        folder = model if "/" in str(model) else dense_folder(model, **(keys or {}))
        return prepare(config_of(folder, "never", text, config))

    return make
