"""Tiny models of every family, and folders with them, for the tests that need a model at all."""

import os
import sys

import pytest
import torch
from hypothesis import settings

# no deadlines, because machines are slow at times; in CI the same examples every time
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_addoption(parser):
    parser.addoption("--stress", action="store_true", help="the full counts (make stress)")


@pytest.fixture(scope="session")
def count(request):
    """count(sample, full): how many to try; the full number under --stress."""
    stress = request.config.getoption("--stress")
    return lambda sample, full: full if stress else sample


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # wide enough for routers that clearly prefer some experts
    "eos_token_id": 0,
    "bos_token_id": 0,
}
LATENT = {
    "num_hidden_layers": 3,  # the first is dense
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "intermediate_size": 48,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are fastest with one thread, and equal to the bit on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli("inspect", folder) -> (exit code, stdout, stderr), in this process."""
    from expertly.__main__ import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["expertly", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture(scope="session")
def tiny_sizes():
    """tiny_sizes(family, **sizes) -> sizes in our words."""

    def make(family: str, **sizes):
        return {**SIZES, **(LATENT if family == "deepseek_v3" else {}), **sizes}

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_sizes):
    """tiny_model(family, **sizes) -> a random model in evaluation mode, the same every time."""
    from expertly.models.build import build_model, model_config

    def make(family: str, *, seed: int = 0, **sizes):
        torch.manual_seed(seed)
        model = build_model(model_config(family, tiny_sizes(family, **sizes))).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 300 tokens."""
    from expertly.models.tokenizer import train_tokenizer

    return train_tokenizer(["the cat and the dog see the red tree"] * 20, 300)


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    """tiny_folder(family) -> a saved model with its tokenizer and manifest; leave it as it is."""
    from expertly.folders import save_folder
    from expertly.models.loading import save_model

    made = {}

    def make(family: str):
        if family not in made:
            model = tiny_model(family)
            target = tmp_path_factory.mktemp("models") / family
            made[family] = save_folder(
                target, lambda folder: save_model(model, folder, tokenizer=tiny_tokenizer)
            )
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_ids():
    """(2, 12) token ids."""
    return torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
