"""Policies on disk: in stock keys where they can say it, refused or beside the weights if not."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertly.errors import ExpertlyError
from expertly.models.attach import attach, attached
from expertly.models.layers import own_policy
from expertly.models.loading import open_model, save_model
from expertly.models.policies import POLICY, read_policy, require_sayable, stock_form
from expertly.moe.policy import Policy

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
each_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits


def own(model, **changes):
    policy = own_policy(model.config.to_dict())
    options = {**policy.options, **changes.pop("options", {})}
    return replace(policy, options=options, **changes)


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="expertly").eval()


@pytest.mark.parametrize(
    ("family", "renormalize"),
    # Mixtral always renormalises
    [
        (family, said)
        for family in FAMILIES
        for said in (True, False)
        if said or family != "mixtral"
    ],
)
def test_what_the_config_can_say_stock_loaders_compute(
    family, renormalize, tiny_model, tiny_ids, tmp_path
):
    model = tiny_model(family)
    policy = own(model, top_k=3, options={"renormalize": renormalize}, capacity_factor=1.0)
    with attach(model, policy) as attachment:
        ours = logits_of(model, tiny_ids)
        save_model(model, tmp_path, attachment=attachment)
    assert not (tmp_path / POLICY).exists()
    assert logits_of(stock(tmp_path), tiny_ids).equal(ours)
    assert logits_of(open_model(tmp_path), tiny_ids).equal(ours)


@pytest.mark.parametrize("router", ["softmax_topk", "biased_sigmoid_topk"])
@each_family
def test_an_option_left_out_is_the_rules_default_not_the_configs(
    family, router, tiny_model, tiny_ids, tmp_path
):
    """OLMoE's config does not renormalise and DeepSeek-V3's scales by 2.5; the rules do not."""
    model = tiny_model(family)
    with attach(model, Policy(router=router, top_k=2)) as attachment:
        ours = logits_of(model, tiny_ids)
        save_model(model, tmp_path, attachment=attachment, allow_non_stock=True)
    assert (tmp_path / POLICY).exists() == (router != own_policy(model.config.to_dict()).router)
    assert logits_of(open_model(tmp_path), tiny_ids).equal(ours)


@pytest.mark.parametrize(
    ("router", "top_k", "plain"),
    [("gshard_top2", 2, True), ("switch_top1", 1, False)],
)
def test_a_rule_that_is_another_at_inference_is_said_as_that(router, top_k, plain, tiny_model):
    config = tiny_model("olmoe").config.to_dict()
    said = stock_form(config, Policy(router=router, top_k=top_k, jitter=0.1, capacity_factor=1.25))
    assert said == {"num_experts_per_tok": top_k, "norm_topk_prob": plain}


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("mixtral", Policy(router="switch_top1", top_k=1)),
        ("mixtral", Policy(router="softmax_topk", top_k=2, options={"scale": 2.0})),
        ("qwen3_moe", Policy(router="biased_sigmoid_topk", top_k=2)),
        ("olmoe", Policy(router="softmax_topk", top_k=2, options={"num_groups": 2})),
        ("deepseek_v3", Policy(router="softmax_topk", top_k=2)),
    ],
)
def test_what_it_cannot_say_needs_permission(family, policy, tiny_model):
    config = tiny_model(family).config.to_dict()
    with pytest.raises(ExpertlyError, match="allow_non_stock") as error:
        require_sayable(config, policy, allow_non_stock=False)
    assert error.value.code == "E204"
    assert require_sayable(config, policy, allow_non_stock=True) is False


def test_saving_what_it_cannot_say_is_refused_before_anything_is_written(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    policy = Policy(router="biased_sigmoid_topk", top_k=2)
    with attach(model, policy) as attachment:
        for given in (None, attachment):
            with pytest.raises(ExpertlyError, match="allow_non_stock=True") as error:
                save_model(model, tmp_path, attachment=given)
            assert error.value.code == "E204"
            assert list(tmp_path.iterdir()) == []
    save_model(model, tmp_path, attachment=attach(model))  # detached: the family's own again
    assert not (tmp_path / POLICY).exists()


def test_an_attachment_that_only_looks_does_not_hide_the_policy_at_work(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    policy = Policy(router="biased_sigmoid_topk", top_k=2)
    with attach(model, policy), attach(model) as looking:
        with pytest.raises(ExpertlyError, match="E204"):
            save_model(model, tmp_path, attachment=looking)
        save_model(model, tmp_path, attachment=looking, allow_non_stock=True)
    assert read_policy(tmp_path).policy == policy


def test_a_default_that_the_family_has_no_word_for_needs_none(tiny_model):
    config = tiny_model("mixtral").config.to_dict()
    policy = Policy(router="softmax_topk", top_k=2, options={"scale": 1.0, "renormalize": True})
    assert require_sayable(config, policy, allow_non_stock=False)


def test_a_bias_lands_in_the_familys_own_tensor_and_stays_float32(tiny_model, tiny_ids, tmp_path):
    model = tiny_model("deepseek_v3")
    name, bias = "model.layers.1.mlp.gate.e_score_correction_bias", torch.linspace(-0.5, 0.5, 8)
    with attach(model, own(model)) as attachment:
        for each in attachment.bias:
            each.copy_(bias)
        ours = logits_of(model, tiny_ids)
        save_model(model, tmp_path / "one", attachment=attachment)
    assert not (tmp_path / "one" / POLICY).exists()
    assert logits_of(open_model(tmp_path / "one"), tiny_ids).equal(ours)
    half = open_model(tmp_path / "one", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.get_buffer(name).dtype == torch.float32
    save_model(half, tmp_path / "two")
    saved = load_file(tmp_path / "two" / "model.safetensors")
    assert saved["lm_head.weight"].dtype == torch.bfloat16
    assert saved[name].equal(bias)
    assert open_model(tmp_path / "two").get_buffer(name).equal(bias)


@pytest.mark.parametrize("router", ["topk_softmax", "biased_sigmoid_topk", "biased_softmax_topk"])
@each_family
def test_a_non_stock_policy_comes_back_with_its_biases(
    family, router, tiny_model, tiny_ids, tmp_path
):
    model = tiny_model(family)
    options = {
        "biased_sigmoid_topk": {"scale": 1.5, "renormalize": False},
        "biased_softmax_topk": {"minimum": 0.5},
    }.get(router, {})
    with attach(model, Policy(router=router, top_k=3, options=options)) as attachment:
        for index, bias in enumerate(attachment.bias):
            if bias is not None:
                bias.copy_(torch.arange(8) * 0.1 + index)
        ours = logits_of(model, tiny_ids)
        save_model(model, tmp_path / "one", allow_non_stock=True)  # the attachment at work is found
    opened = open_model(tmp_path / "one")
    assert logits_of(opened, tiny_ids).equal(ours)
    save_model(opened, tmp_path / "two", allow_non_stock=True)
    assert logits_of(open_model(tmp_path / "two"), tiny_ids).equal(ours)
    if (tmp_path / "one" / POLICY).exists():
        assert attached(opened).policy.router == router
        assert not logits_of(stock(tmp_path / "one"), tiny_ids).equal(ours)
    else:
        assert (family, router) == ("deepseek_v3", "biased_sigmoid_topk")


def test_twelve_biases_come_back_in_their_order(tiny_model, tmp_path):
    model = tiny_model("mixtral", num_hidden_layers=12)
    with attach(model, Policy(router="biased_sigmoid_topk", top_k=2)) as attachment:
        for index, bias in enumerate(attachment.bias):
            bias.fill_(index)
        save_model(model, tmp_path, allow_non_stock=True)
    assert [float(bias[0]) for bias in read_policy(tmp_path).bias] == list(range(12))


GOOD = {"router": "biased_sigmoid_topk", "top_k": 2, "options": {}}


@pytest.mark.parametrize(
    ("said", "tensors"),
    [
        pytest.param(None, {}, id="no metadata"),
        pytest.param("{", {}, id="not JSON"),
        pytest.param("[]", {}, id="not an object"),
        pytest.param("{}", {}, id="empty"),
        pytest.param(json.dumps({**GOOD, "top_k": "two"}), {}, id="text for a number"),
        pytest.param(json.dumps({**GOOD, "options": 3}), {}, id="options are no mapping"),
        pytest.param(json.dumps(GOOD), {"bias.x": 8}, id="a name without number"),
        pytest.param(json.dumps(GOOD), {"bias.0": 8}, id="too few biases"),
        pytest.param(json.dumps(GOOD), {"bias.0": 4, "bias.1": 4}, id="of another size"),
    ],
)
def test_a_damaged_policy_is_one_line(said, tensors, tiny_model, tmp_path):
    save_model(tiny_model("mixtral"), tmp_path)
    (tmp_path / POLICY).parent.mkdir()
    held = {name: torch.zeros(size) for name, size in tensors.items()} or {"empty": torch.zeros(1)}
    save_file(held, tmp_path / POLICY, metadata=None if said is None else {"policy": said})
    with pytest.raises(ExpertlyError) as error:
        open_model(tmp_path)
    assert error.value.code == "E301"


def test_a_policy_that_is_no_safetensors_is_one_line(tiny_model, tmp_path):
    save_model(tiny_model("mixtral"), tmp_path)
    (tmp_path / POLICY).parent.mkdir()
    (tmp_path / POLICY).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ExpertlyError) as error:
        open_model(tmp_path)
    assert error.value.code == "E301"
