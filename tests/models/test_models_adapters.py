"""Adapters: what gets one, what they compute beside PEFT's own, and folding them in."""

import sys

import pytest
import torch
from adapted import adapted, filled, folder_of, learnt, saved_adapter, stock
from packed_models import logits_of, model_of
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.testing import assert_close as close

from expertly.errors import ExpertlyError
from expertly.models.adapters import AdapterSpec, add_adapter, merge_adapter, wrapped
from expertly.models.attach import attach
from expertly.models.layers import moe_layers, own_policy
from expertly.models.loading import load_weights
from expertly.moe.policy import Policy

# plain; transposed, gates between ups, biases; latent attention and shared experts; no gate
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
TARGETS = {
    "deepseek_v3": ("experts", "attention", "shared_experts", "router"),
    "gpt_oss": ("experts", "attention", "router"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family) -> a dense model's folder; leave it as it is."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = folder_of(family, tmp_path_factory.mktemp("base"))
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_as_stock_peft(family, folders, tiny_ids, tmp_path):
    """Logits and all gradients; PEFT reads what we wrote."""
    base = folders(family)
    ours = adapted(base, targets=TARGETS.get(family, ("experts", "attention")))
    adapter = saved_adapter(ours, base, tmp_path)
    logits, gradients = learnt(ours, tiny_ids)
    wanted, others = learnt(stock(adapter, base, ours), tiny_ids)
    close(logits, wanted, rtol=1e-5, atol=1e-5)
    same_gradients(gradients, others, 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_packed_weights_as_stock_peft_on_their_numbers(
    family, bits, folders, tiny_ids, tmp_path
):
    base = folders(family)
    ours = adapted(base, bits=bits)
    adapter = saved_adapter(ours, base, tmp_path)
    logits, gradients = learnt(ours, tiny_ids)
    wanted, others = learnt(stock(adapter, base, ours), tiny_ids)
    close(logits, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    same_gradients(gradients, others, 1e-3)


def same_gradients(ours, others, share):
    """Each as long and as pointed, within a share of its length."""
    assert ours.keys() == others.keys() and ours
    for name, wanted in others.items():
        assert wanted.any(), name
        assert (ours[name] - wanted).norm() <= share * wanted.norm(), name


@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_wrapped(bits, folders):
    rows = {row.part: row[1:] for row in wrapped(adapted(folders("qwen3_moe"), bits=bits, r=2))}
    layers, experts, dim, hidden = 3, 8, 64, 32
    widths = (dim + 2 * hidden) + (hidden + dim)  # of gate_up and down
    assert rows["experts"] == (2 * layers, 2 * layers * experts * widths)
    widths = 2 * (dim + 64) + 2 * (dim + 32)  # of q and o, k and v
    assert rows["attention"] == (4 * layers, 2 * layers * widths)
    assert rows["router"] == (0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_nothing_changes_and_only_adapters_learn(family, folders, tiny_ids):
    model = load_weights(folders(family))
    before = logits_of(model, tiny_ids)
    targets = TARGETS.get(family, ("experts", "attention"))
    add_adapter(model, AdapterSpec(r=2, lora_alpha=4.0, targets=targets))
    assert logits_of(model, tiny_ids).equal(before)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    assert {row.part for row in wrapped(model) if row.weights} == {*targets}


@pytest.mark.parametrize("first", ["attach", "add"])
def test_routers_and_experts_are_found_inside_the_adapters(first, folders, tiny_ids):
    """A policy that is attached sees the router's adapter, too."""
    model = load_weights(folders("qwen3_moe"))
    bare = [(layer.router, layer.experts) for layer in moe_layers(model)]
    spec = AdapterSpec(r=2, lora_alpha=4.0, targets=("experts", "router"))
    policy = Policy(**vars(own_policy(model.config.to_dict())))
    if first == "attach":
        attachment = attach(model, policy)
        add_adapter(model, spec)
    else:
        add_adapter(model, spec)
        attachment = attach(model, policy)
    assert [(layer.router, layer.experts) for layer in moe_layers(model)] == bare
    filled(model)
    out = logits_of(model, tiny_ids)
    chosen = [decision.chosen.experts for decision in attachment.decisions]
    attachment.detach()
    close(logits_of(model, tiny_ids), out)
    merge_adapter(model)
    with attach(model) as look:
        close(logits_of(model, tiny_ids), out, rtol=1e-4, atol=1e-4)
        for now, before in zip(look.decisions, chosen, strict=True):
            assert now.chosen.experts.sort(-1)[0].equal(before.sort(-1)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_in(family, folders, tiny_ids):
    """The same answers from a model of the same parameters as before, all of them its own."""
    names = {name: p.shape for name, p in model_of(family).named_parameters()}
    targets = TARGETS.get(family, ("experts", "attention"))
    model = adapted(folders(family), targets=targets)
    before = logits_of(model, tiny_ids)
    merge_adapter(model)
    close(logits_of(model, tiny_ids), before, rtol=1e-4, atol=1e-4)
    assert {name: p.shape for name, p in model.named_parameters()} == names
    assert not any(row.weights for row in wrapped(model))
    assert not any(hasattr(layer.experts, "low_rank") for layer in moe_layers(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_on_another_back_end(family, folders, tiny_ids):
    """PEFT adds the terms there itself: they are never left out."""
    model = adapted(folders(family))
    out = logits_of(model, tiny_ids)
    model.set_experts_implementation("eager")
    close(logits_of(model, tiny_ids), out, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_switched_off(folders, tiny_ids):
    """By PEFT's own switch."""
    base = logits_of(load_weights(folders("gpt_oss")), tiny_ids)
    model = adapted(folders("gpt_oss"))
    assert (logits_of(model, tiny_ids) - base).abs().max() > 0.1
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    close(logits_of(model, tiny_ids), base)


def test_folding_in_what_is_no_number(folders):
    model = adapted(folders("qwen3_moe"))
    next(p for n, p in model.named_parameters() if "experts" in n and "lora_B" in n).data[0] = (
        torch.nan
    )
    refused("E301", "the adapter", lambda: merge_adapter(model))


def test_targets_that_match_nothing():
    for family, target, said in (
        ("qwen3_moe", "shared_experts", "has no shared experts. FIX: choose of: experts, attent"),
        ("llama", "experts", "LlamaForCausalLM has no experts. FIX: choose of: attention"),
        ("llama", "router", "has no router"),
    ):
        spec = AdapterSpec(r=2, lora_alpha=4.0, targets=(target,))
        model = model_of(family)
        refused("E202", said, lambda model=model, spec=spec: add_adapter(model, spec))
        assert all(p.requires_grad for p in model.parameters())  # nothing was touched


def test_a_family_that_is_refused():
    spec = AdapterSpec(r=2, lora_alpha=4.0)
    refused("E306", "jetmoe", lambda: add_adapter(model_of("jetmoe"), spec))


def test_experts_in_the_familys_own_code():
    """A name is not enough: they must run behind transformers' seam."""
    model = model_of("qwen3_moe")
    for layer in moe_layers(model):
        kind = type(layer.experts)
        layer.experts.__class__ = type("Own", (nn.Module,), {"forward": kind.forward})
        del layer.experts.is_transposed
    spec = AdapterSpec(r=2, lora_alpha=4.0)
    refused("E306", "own code", lambda: add_adapter(model, spec))


def test_shared_experts_that_are_packed(folders):
    asked = {"bits": 8, "targets": ("experts", "shared_experts")}
    refused("E306", "shared experts", lambda: adapted(folders("deepseek_v3"), **asked))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    spec = AdapterSpec(r=2, lora_alpha=4.0)
    refused(
        "E207", "pip install 'expertly[finetune]'", lambda: add_adapter(model_of("llama"), spec)
    )


def refused(code, said, call):
    with pytest.raises(ExpertlyError) as error:
        call()
    assert error.value.code == code and said in str(error.value), error.value
    assert "\n" not in str(error.value)
