"""What is changed on a lean model after it was made lean counts as it does on a stock one."""

import io
import pickle
from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import expertly
from expertly.kernels.native import library
from expertly.models import lean_attention
from expertly.models.lean import make_lean, undo_lean
from expertly.models.lean_attention import LeanAttention
from expertly.models.lean_forward import lean_of
from expertly.models.lean_router import LeanRouter
from expertly.models.loading import save_model

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

SIZES = {
    "qwen3_moe": {"hidden_size": 128, "head_dim": 32},
    "olmoe": {"hidden_size": 128},
    "mixtral": {"hidden_size": 128},
    "deepseek_v3": {},
}


@pytest.fixture(scope="module")
def lean_model(tiny_model):
    """lean_model(family, dtype) -> a lean model."""

    def make(family, dtype=torch.float32):
        model = tiny_model(family, **SIZES[family]).to(dtype)
        make_lean(model)
        return model

    return make


@torch.inference_mode()
def stepped(model, ids):
    """Logits of one token after another, behind the first two."""
    out = model(ids[:, :2], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for token in ids[:, 2:6].split(1, dim=1):
        logits.append(model(token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def kinds(model):
    return Counter(type(lean_of(module)) for module in model.modules() if lean_of(module))


def bare(model):
    """The same model, stock."""
    stock = deepcopy(model)
    undo_lean(stock)
    return stock


def lean_modules(model, kind):
    return [module for module in model.modules() if isinstance(lean_of(module), kind)]


CHANGES = {
    ("qwen3_moe", LeanRouter): {"top_k": 3, "norm_topk_prob": False},
    ("deepseek_v3", LeanRouter): {"routed_scaling_factor": 9.0, "topk_group": 1, "top_k": 1},
    ("qwen3_moe", LeanAttention): {"scaling": 0.9},
}


@pytest.mark.parametrize(
    ("family", "kind", "name", "value"),
    [(*key, name, value) for key, changes in CHANGES.items() for name, value in changes.items()],
)
def test_settings_changed_later_are_followed(family, kind, name, value, lean_model, tiny_ids):
    model = lean_model(family)
    for module in lean_modules(model, kind):
        assert hasattr(module, name)
        setattr(module, name, value)
    want, got = stepped(bare(model), tiny_ids), stepped(model, tiny_ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("what", ["clip", "eps"])
def test_what_attention_reads_elsewhere_is_followed(what, lean_model, tiny_ids):
    model = lean_model("olmoe")
    if what == "clip":
        model.config.clip_qkv = 0.05
    else:
        for module in lean_modules(model, LeanAttention):
            module.q_norm.variance_epsilon = module.k_norm.variance_epsilon = 1.0
    want, got = stepped(bare(model), tiny_ids), stepped(model, tiny_ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", SIZES)
def test_another_dtype_later_is_the_stock_code(family, lean_model, tiny_ids):
    model = lean_model(family).to(torch.bfloat16)
    assert stepped(model, tiny_ids).equal(stepped(bare(model), tiny_ids))
    model.to(torch.float32)
    want, got = stepped(bare(model), tiny_ids), stepped(model, tiny_ids)
    assert not got.equal(want)  # native again
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_routers_are_stock_in_training_mode(lean_model, monkeypatch):
    [router, *_] = lean_modules(lean_model("mixtral"), LeanRouter)
    monkeypatch.setattr(lean_of(router), "route", lambda *_: pytest.fail("native"))
    with torch.no_grad():
        router.train()(torch.randn(1, 128))


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "q_norm"])
def test_a_forward_of_somebody_elses_is_called(name, lean_model, tiny_ids):
    model = lean_model("qwen3_moe")
    module, calls = model.model.layers[1].self_attn.get_submodule(name), []
    own = module.forward
    module.forward = lambda x: calls.append(1) or own(x)
    stepped(model, tiny_ids)
    assert len(calls) == 5


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_hooks_on_every_module_see_what_attention_passes_by(register, lean_model, tiny_ids):
    model, seen = lean_model("qwen3_moe"), Counter()
    handle = register(lambda module, *_: seen.update([module]))
    try:
        stepped(model, tiny_ids)
    finally:
        handle.remove()
    attention = model.model.layers[0].self_attn
    assert {seen[attention.get_submodule(name)] for name in ("q_proj", "k_norm", "o_proj")} == {5}


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch": through_torch}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_pickled_model_comes_back_lean(way, family, lean_model, tiny_ids):
    model = lean_model(family)
    again = WAYS[way](model)
    assert kinds(again) == kinds(model)
    assert stepped(again, tiny_ids).equal(stepped(model, tiny_ids))
    assert all(module.forward.args[0] is module for module in again.modules() if lean_of(module))


def test_a_packed_model_comes_back_packed_and_lean(tiny_model, tiny_ids, tmp_path):
    sizes = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 32}
    save_model(tiny_model("qwen3_moe", **sizes).bfloat16(), tmp_path / "model")
    model = expertly.open_model(tmp_path / "model", bits=4)
    want = stepped(model, tiny_ids)
    again = pickle.loads(pickle.dumps(model))
    assert {LeanAttention, LeanRouter} < set(kinds(again))
    assert stepped(again, tiny_ids).equal(want)


def test_without_the_kernels_a_pickled_model_is_stock(lean_model, tiny_ids, monkeypatch):
    model = lean_model("qwen3_moe")
    data, want = pickle.dumps(model), stepped(bare(model), tiny_ids)
    for kind in kinds(model):
        monkeypatch.setattr(kind, "looked_up", staticmethod(lambda: None))
    assert stepped(pickle.loads(data), tiny_ids).equal(want)


def test_a_trial_never_compares_the_stock_code_with_itself(tiny_model, monkeypatch):
    attention = tiny_model("mixtral", hidden_size=128).model.layers[0].self_attn
    off = lambda self, module, x, *_: (x * 0, None)  # noqa: E731
    monkeypatch.setattr(LeanAttention, "_attend", off)
    monkeypatch.setattr(LeanAttention, "as_tried", lambda *_: False)
    with torch.inference_mode():
        native = LeanAttention.looked_up()
        assert lean_attention.lean_attention(attention, native, torch.float32) is None


def test_a_cache_trained_through_is_the_stock_one(lean_model, tiny_ids):
    losses = []
    model = lean_model("olmoe")
    for each in (bare(model), model):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        cache = DynamicCache()
        total = sum(
            each(ids, past_key_values=cache, use_cache=True).logits.square().mean()
            for ids in tiny_ids.split(4, dim=1)
        )
        total.backward()
        losses.append(each.model.layers[0].self_attn.q_proj.weight.grad)
    assert losses[0].equal(losses[1])
