"""Lean and stock models of many families beside each other, in bfloat16 as they are served."""

from copy import deepcopy

import pytest
import torch
from tiny_families import tiny_family

from expertly.kernels.native import library
from expertly.models.lean import make_lean, undo_lean
from expertly.models.lean_forward import lean_of
from expertly.models.lean_norm import LeanNorm
from expertly.models.lean_router import LeanRouter

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

# every way to round a norm, every rule that the native router knows, and none of them
FAMILIES = (
    *("mixtral", "granitemoe", "gpt_oss", "gemma4_text", "olmoe", "flex_olmo", "cohere2_moe"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v4", "glm4_moe", "minimax_m2", "nemotron_h", "phimoe", "llama4_text"),
)
KEPT = {"deepseek_v4": "norm"}  # stays in float32 when transformers loads the family


def drawn(family):
    model = tiny_family(family)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
        if name.count(KEPT.get(family, "-")) == 0:
            parameter.data = parameter.data.bfloat16()
    return model


@torch.inference_mode()
def logits_of(model, ids):
    """Of a prompt and of three tokens behind it."""
    out = model(ids[:, :5], use_cache=True)
    logits = [out.logits]
    for token in ids[:, 5:8].split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_answers_are_the_stock_ones_but_for_tipped_roundings(family, tiny_ids):
    lean = drawn(family)
    stock = deepcopy(lean)
    make_lean(lean)
    want, got = logits_of(stock, tiny_ids), logits_of(lean, tiny_ids)
    assert got.dtype == want.dtype
    far = (got.float() - want.float()).norm() / want.float().norm()
    # a norm that rounds once more than it should is 30 times as far
    assert far < 0.002
    undo_lean(lean)
    assert logits_of(lean, tiny_ids).equal(want)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_each_module_answers_as_its_own_forward(family):
    model = drawn(family)
    make_lean(model)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if not isinstance(lean_of(module), LeanNorm | LeanRouter):
            continue
        x = torch.randn(4, module.weight.shape[-1], generator=generator).bfloat16()
        want, got = type(module).forward(module, x), module(x)
        pairs = [(want, got)] if torch.is_tensor(want) else [*zip(want, got, strict=True)][:2]
        for mine, own in pairs:
            assert mine.dtype == own.dtype
            torch.testing.assert_close(mine, own, rtol=0.01, atol=0.01 * float(own.abs().max()))
