"""Lean forwards answer as the stock ones do, and step back where they must."""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from expertly.kernels.native import library
from expertly.models.attach import attach
from expertly.models.cache import GrowingLayer
from expertly.models.lean import make_lean, undo_lean
from expertly.models.lean_attention import LeanAttention
from expertly.models.lean_forward import lean_of
from expertly.models.lean_norm import LeanNorm
from expertly.models.lean_router import LeanRouter
from expertly.moe.policy import Policy

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

WIDE = {"hidden_size": 128, "head_dim": 32}  # native attention takes 32 numbers at a time
# family -> what is lean besides its norms
FAMILIES = {
    "mixtral": {LeanAttention, LeanRouter},
    "olmoe": {LeanAttention, LeanRouter},
    "qwen3_moe": {LeanAttention, LeanRouter},
    "deepseek_v3": {LeanRouter},
}


@pytest.fixture(scope="module")
def lean_pair(tiny_model):
    """lean_pair(family, dtype) -> a stock model and the same one, lean."""

    def make(family, dtype=torch.float32):
        sizes = {} if family == "deepseek_v3" else WIDE
        if family in ("olmoe", "mixtral"):
            sizes = {"hidden_size": 128}
        stock = tiny_model(family, **sizes).to(dtype)
        for name, parameter in stock.named_parameters():
            if "norm" in name:
                parameter.data = torch.rand_like(parameter) + 0.5
        lean = deepcopy(stock)
        make_lean(lean)
        return stock, lean

    return make


def kinds(model):
    return Counter(type(lean_of(module)) for module in model.modules() if lean_of(module))


@torch.inference_mode()
def stepped(model, ids, prompt):
    """Logits of a prompt, and of the tokens behind it one by one."""
    out = model(ids[:, :prompt], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for token in ids[:, prompt:].split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_a_lean_model_answers_as_the_stock_one(family, dtype, close, lean_pair, tiny_ids):
    stock, lean = lean_pair(family, dtype)
    want, got = stepped(stock, tiny_ids, 5), stepped(lean, tiny_ids, 5)
    assert (got - want).float().norm() <= close * want.float().norm()  # of all: routing may tip
    assert FAMILIES[family] | {LeanNorm} == set(kinds(lean))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_lean_and_the_same(family, lean_pair, tiny_ids):
    stock, lean = lean_pair(family)
    settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
    want, got = (model.generate(tiny_ids, **settings) for model in (stock, lean))
    assert got.sequences.equal(want.sequences)
    layers = got.past_key_values.layers
    assert {type(layer) for layer in layers} == {GrowingLayer}


def test_padding_and_beams_are_the_stock_code(lean_pair, tiny_ids):
    stock, lean = lean_pair("mixtral")
    mask = torch.ones_like(tiny_ids)
    mask[1, :4] = 0
    for settings in ({"attention_mask": mask}, {"num_beams": 3}):
        settings |= {"max_new_tokens": 8, "do_sample": False}
        assert lean.generate(tiny_ids, **settings).equal(stock.generate(tiny_ids, **settings))


def test_a_window_shorter_than_the_text(tiny_model, tiny_ids):
    stock = tiny_model("mixtral", hidden_size=128, sliding_window=4)
    lean = deepcopy(stock)
    make_lean(lean)
    assert torch.allclose(stepped(lean, tiny_ids, 6), stepped(stock, tiny_ids, 6), atol=1e-3)


def test_training_is_the_stock_code_to_the_bit(lean_pair, tiny_ids):
    stock, lean = lean_pair("olmoe")
    for model in (stock, lean):
        model.train()
        model(tiny_ids, labels=tiny_ids).loss.backward()
    pairs = zip(stock.parameters(), lean.parameters(), strict=True)
    assert all(a.grad.equal(b.grad) for a, b in pairs if a.grad is not None)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert lean(tiny_ids).logits.equal(stock(tiny_ids).logits)


def test_a_policy_decides_on_a_lean_model(lean_pair, tiny_ids):
    stock, lean = lean_pair("mixtral")
    policy = Policy(router="softmax_topk", top_k=3)
    with attach(stock, policy) as want, attach(lean, policy) as got:
        a, b = stepped(stock, tiny_ids, 11), stepped(lean, tiny_ids, 11)
        assert torch.allclose(a, b, atol=1e-3 * float(a.abs().max()))
        for mine, theirs in zip(got.decisions, want.decisions, strict=True):
            assert mine.served.experts.equal(theirs.served.experts)


def test_who_only_looks_sees_the_same_decisions(lean_pair, tiny_ids):
    stock, lean = lean_pair("deepseek_v3")
    with attach(stock) as want, attach(lean) as got:
        stepped(stock, tiny_ids, 11), stepped(lean, tiny_ids, 11)
        for mine, theirs in zip(got.decisions, want.decisions, strict=True):
            assert torch.allclose(mine.served.logits, theirs.served.logits, atol=1e-4)
            assert torch.allclose(
                mine.served.weights.sort().values, theirs.served.weights.sort().values, atol=1e-4
            )


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"])
def test_hooks_inside_attention_are_called(name, lean_pair, tiny_ids):
    _, lean = lean_pair("qwen3_moe")
    module, calls = lean.model.layers[1].self_attn.get_submodule(name), []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    stepped(lean, tiny_ids, 9)
    handle.remove()
    assert len(calls) == 4


def test_eager_attention_still_shows_its_weights(lean_pair, tiny_ids):
    stock, lean = lean_pair("olmoe")
    for model in (stock, lean):
        model.set_attn_implementation("eager")
    settings = {"max_new_tokens": 3, "do_sample": False, "output_attentions": True}
    settings["return_dict_in_generate"] = True
    want, got = (model.generate(tiny_ids, **settings).attentions for model in (stock, lean))
    assert torch.allclose(got[-1][1], want[-1][1], atol=1e-5)


def test_a_copy_is_lean_by_itself(lean_pair, tiny_ids):
    _, lean = lean_pair("olmoe")
    copied = deepcopy(lean)
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter.zero_()
    assert kinds(copied) == kinds(lean)
    assert stepped(copied, tiny_ids, 9).abs().max() > 0
    assert stepped(lean, tiny_ids, 9).abs().max() == 0


def test_weights_that_change_later_are_seen(lean_pair, tiny_ids):
    stock, lean = lean_pair("olmoe")
    for model in (stock, lean):
        model.to(torch.bfloat16).to(torch.float32)
        model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})
    want = stepped(stock, tiny_ids, 9)
    assert torch.allclose(stepped(lean, tiny_ids, 9), want, atol=1e-4 * float(want.abs().max()))


def test_undo_leaves_no_trace(lean_pair, tiny_ids):
    stock, lean = lean_pair("mixtral")
    make_lean(lean)  # twice is once
    assert len(lean._forward_pre_hooks) == 1
    undo_lean(lean)
    assert not kinds(lean)
    assert not lean._forward_pre_hooks
    assert stepped(lean, tiny_ids, 5).equal(stepped(stock, tiny_ids, 5))


def test_nothing_touches_the_generator_or_the_modules(tiny_model):
    model = tiny_model("mixtral", hidden_size=128)
    before = torch.get_rng_state(), list(model.state_dict()), repr(model)
    make_lean(model)
    assert before[0].equal(torch.get_rng_state())
    assert before[1:] == (list(model.state_dict()), repr(model))


def test_a_cache_of_the_callers_own_grows_from_then_on(lean_pair, tiny_ids):
    _, lean = lean_pair("mixtral")
    cache = DynamicCache(config=lean.config)
    with torch.inference_mode():
        lean(tiny_ids, past_key_values=cache)
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}
