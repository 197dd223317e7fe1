"""The proof and its receipt."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertly.receipts import read, sha256
from expertly.upcycle.proof import prove, receipt_of
from expertly.upcycle.text import text_rows


def by_transformers(folder, ids):
    """A stock model's logits and perplexity on ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return logits, math.exp(loss)


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {"drop": 0.5, "slices": 2}), ("gemma", {"num_experts": 2})],
)
def test_its_figures_are_those_of_stock_transformers(
    family, config, upcycled, prepared, dense_folder
):
    result, ids = upcycled(family, **config), text_rows(prepared(family), 256, held_out=True)
    figures = read(result.folder).figures
    dense, dense_perplexity = by_transformers(dense_folder(family), ids)
    made, perplexity = by_transformers(result.folder, ids)
    largest = float((dense - made).abs().max())
    assert figures["largest_logit_difference"] == pytest.approx(largest, rel=1e-4, abs=1e-5)
    said = figures["perplexity"]
    assert said == {
        "dense": pytest.approx(dense_perplexity, rel=1e-4),
        "moe": pytest.approx(perplexity, rel=1e-4),
    }
    assert figures["held_out_tokens"] == ids.numel() > 100
    tensors = load_file(result.folder / "model.safetensors").values()
    assert figures["parameters"] == sum(each.numel() for each in tensors)
    assert figures["bytes"] == sum(each.nbytes for each in tensors)
    experts = 3 * 32 * 48 * (result.num_experts // config.get("slices", 1)) * 2
    active = figures["parameters"] - experts * (1 - result.top_k / result.num_experts)
    assert figures["active_parameters"] == active


def test_a_receipt_says_what_was_done(upcycled, dense_folder):
    result = upcycled("llama", drop=0.5, slices=2)
    receipt, dense = read(result.folder), dense_folder("llama")
    assert (receipt.job, receipt.verdict) == ("upcycle", "pass")
    assert receipt.inputs["dense"] == {
        "path": str(dense.resolve()),
        "config": sha256(dense / "config.json"),
    }
    assert "drop: 0.5" in receipt.inputs["config"]
    assert {"torch", "transformers", "safetensors", "expertly"} <= receipt.versions.keys()
    assert receipt.changed == {
        "method": "slices",
        "target": "mixtral",
        "copies": 8,
        "slices": 2,
        "layers": [0, 1],
        "drop": 0.5,
        "noise": 0.0,
        "shared": False,
        "router": "random",
        "specialists": [],
    }
    assert receipt.figures["seconds"] > 0
    assert receipt.figures["peak_bytes"] > 10**7
    json.dumps(receipt.figures, allow_nan=False)


@pytest.mark.parametrize("harm", [3.0, math.nan])
def test_a_damaged_expert_is_seen(harm, prepared, upcycle):
    result = upcycle("llama", num_experts=2)
    job = prepared("llama", num_experts=2)
    tensors = load_file(result.folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.1.w2.weight"][0] += harm
    save_file(tensors, result.folder / "model.safetensors", metadata={"format": "pt"})
    (result.folder / "MANIFEST.json").unlink()
    proof = prove(job, result.folder, text_rows(job, 256, held_out=True))
    receipt = receipt_of(job, proof, result.parameters, {})
    assert receipt.verdict == "fail"
    failed = [check.name for check in receipt.checks if not check.passed]
    assert failed[-1] == "largest logit difference to the dense model"
    assert ("the MoE's loss is a number" in failed) == math.isnan(harm)


def test_parameters_that_are_not_those_of_the_config_are_seen(prepared, upcycled):
    result, job = upcycled("llama"), prepared("llama")
    proof = prove(job, result.folder, text_rows(job, 64, held_out=True))
    assert receipt_of(job, proof, result.parameters, {}).verdict == "pass"
    assert receipt_of(job, proof, result.parameters + 1, {}).verdict == "fail"
