"""The proof and its receipt."""

import json
import math
from collections import Counter
from unittest.mock import ANY

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertly.receipts import read, sha256
from expertly.upcycle.proof import mixed_slices, prove, receipt_of
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
    weights = dense / "model.safetensors"
    assert (receipt.job, receipt.verdict) == ("upcycle", "pass")
    assert receipt.inputs["dense"] == {
        "path": str(dense.resolve()),
        "config": sha256(dense / "config.json"),
        "weights": {"model.safetensors": [weights.stat().st_size, ANY]},
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


# --- Slices in 16 bits -------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 2), st.integers(0, 99))
def test_mixed_slices_are_those_of_a_longer_way(slices, copies, chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(20, 8, generator=generator)
    rows = torch.randn(copies, 8, generator=generator)
    rows[1] = rows[0] * (1 + 1e-3 * (seed % 2))  # ties, all of them or in 16 bits only
    router = rows.repeat_interleave(slices, dim=0)
    found = mixed_slices(states, router, chosen * slices, slices)
    logits = states.bfloat16() @ router.bfloat16().T
    for token, mixed in enumerate(found.tolist()):
        experts = logits[token].topk(chosen * slices).indices.tolist()
        counts = Counter(expert // slices for expert in experts)
        assert mixed == any(count != slices for count in counts.values())


def test_a_receipt_says_how_many_tokens_that_would_be(upcycled):
    figures = read(upcycled("llama", drop=0.5, slices=2).folder).figures
    assert 0 <= figures["tokens_with_mixed_slices_in_16_bits"] <= figures["held_out_tokens"]
    assert "tokens_with_mixed_slices_in_16_bits" not in read(upcycled("llama").folder).figures


def test_copies_that_only_float32_tells_apart_are_counted(upcycle, monkeypatch):
    def near(job, say):
        rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        rows[2] = rows[0] + 1e-5
        return dict.fromkeys(job.moe_layers, rows)

    monkeypatch.setattr("expertly.upcycle.run.router_rows", near)
    made = upcycle("llama", num_experts=16, slices=4, top_k=4)
    figures = read(made.folder).figures
    assert made.exact and figures["tokens_with_mixed_slices_in_16_bits"] > 0
