"""Tiny models with a policy attached, text of two domains, and runs that take a second."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from expertly.config import load
from expertly.models.attach import attach
from expertly.models.layers import own_policy
from expertly.train.config import TrainConfig


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """tiny(family, **sizes) -> (model in training mode, its attachment); policy fields by name."""

    def make(family: str, *, policy: dict | None = None, **sizes):
        model = tiny_model(family, **sizes).train()
        followed = replace(own_policy(model.config.to_dict()), **(policy or {}))
        return model, attach(model, followed)

    return make


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with words.txt and digits.txt to train on, and a held-out file of each."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = ["the", "a", "red", "green", "cat", "dog", "sees", "hears", "and", "or", "tree"]
    for name, count in (("words", 4000), ("words_held_out", 330)):
        text = " ".join(draw.choice(words) for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
    for name, count in (("digits", 1500), ("digits_held_out", 150)):
        sums = (f"{a}+{b}={a + b};" for a, b in ((draw.randrange(50),) * 2 for _ in range(count)))
        (folder / f"{name}.txt").write_text("".join(sums))
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def yaml_file(texts, token_cache) -> Path:
    """A run of 12 steps on the texts; overrides say which model."""
    file = texts / "run.yaml"
    file.write_text(
        f"""\
output_dir: {texts / "unused"}
model:
  family: qwen3_moe
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  num_experts: 4
  num_experts_per_tok: 2
  moe_intermediate_size: 32
  extra: {{head_dim: 8}}
data:
  sources:
    - {{path: {texts / "words.txt"}}}
    - {{path: {texts / "digits.txt"}}}
    - {{path: {texts / "words_held_out.txt"}, domain: words, eval: true}}
    - {{path: {texts / "digits_held_out.txt"}, domain: digits, eval: true}}
  eval_fraction: 0
  sequence_length: 32
  vocab_size: 300
  eval_tokens: 500
  cache_dir: {token_cache}
optim: {{learning_rate: 1e-2}}
schedule: {{max_steps: 12, per_device_train_batch_size: 4}}
eval: {{eval_steps: 6}}
log: {{logging_steps: 1, save_steps: 3}}
"""
    )
    return file


@pytest.fixture(scope="session")
def configure(yaml_file):
    """configure(output_dir, "key=value", ...) -> TrainConfig."""

    def make(output_dir: Path, *overrides: str) -> TrainConfig:
        return load(TrainConfig, yaml_file, [f"output_dir={output_dir}", *overrides])

    return make
