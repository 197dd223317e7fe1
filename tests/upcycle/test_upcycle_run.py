"""The whole job on every make: the same function in stock transformers, or one line and nothing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertly.errors import ExpertlyError
from expertly.receipts import read

IDS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(1))
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
CASES = [
    pytest.param("llama", {}, {}, "mixtral", id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, {}, "mixtral", id="tied"),
    pytest.param("llama", {}, {"slices": 4, "num_experts": 16, "top_k": 4}, "mixtral", id="slices"),
    pytest.param("llama", {}, {"slices": 4, "num_experts": 16, "top_k": 8}, "mixtral", id="two"),
    pytest.param("llama", {}, {"shared": True}, "qwen2_moe", id="shared"),
    pytest.param("llama", {}, {"shared": True, "slices": 2}, "qwen2_moe", id="shared-slices"),
    pytest.param("llama", {}, {"every": 2}, "qwen2_moe", id="every"),
    pytest.param("llama", {"head_dim": 16}, {}, "mixtral", id="heads"),
    pytest.param("llama", {}, {"router": "zero", "top_k": 1}, "mixtral", id="zero"),
    pytest.param("llama", {}, {"router": "clusters"}, "mixtral", id="clusters"),
    pytest.param("mistral", {"sliding_window": 16}, {}, "mixtral", id="mistral"),
    pytest.param("mistral", {"sliding_window": 16}, {"shared": True}, "qwen2_moe", id="window"),
    pytest.param("qwen2", {}, {}, "qwen2_moe", id="qwen2"),
    pytest.param("qwen2", {"sliding_window": 16, **SLIDING}, {}, "qwen2_moe", id="qwen2-some"),
    pytest.param("qwen3", {}, {}, "qwen3_moe", id="qwen3"),
    pytest.param("qwen3", {"attention_bias": True}, {"every": 2}, "qwen3_moe", id="qwen3-bias"),
    pytest.param("gemma", {"head_dim": 8}, {}, "mixtral", id="gemma"),
    pytest.param("olmo2", {}, {"slices": 2}, "flex_olmo", id="olmo2"),
]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("family", "keys", "config", "target"), CASES)
def test_stock_transformers_computes_the_same(upcycle, dense_folder, family, keys, config, target):
    made = upcycle(family, keys=keys, **config)
    assert json.loads((made.folder / "config.json").read_text())["model_type"] == target
    dense, moe = logits(dense_folder(family, **keys)), logits(made.folder)
    torch.testing.assert_close(moe, dense, atol=2e-5, rtol=1e-4)
    assert made.exact and made.largest_logit_difference < 1e-4
    receipt = read(made.folder)
    assert receipt.verdict == "pass"
    assert receipt.figures["perplexity"]["moe"] == pytest.approx(made.perplexity["dense"], rel=1e-4)


def test_x():
    assert ExpertlyError
