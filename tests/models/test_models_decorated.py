"""Every MoE family of the installed transformers is read, or refused by name: none is guessed.

As a script it writes docs/families.md: `python tests/models/test_models_decorated.py`.
"""

import copy
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny_families import experts_classes, families, tiny_config, tiny_family
from torch.testing import assert_close as close

from expertly.errors import ExpertlyError
from expertly.families import (
    FAMILIES,
    REFUSED,
    active_width,
    decoder,
    family_of,
    moe_layer_indices,
    require_family,
    sizes,
)
from expertly.models.attach import attach
from expertly.models.build import build_model, twin_config
from expertly.models.experts import register_experts
from expertly.models.inspect import inspect_folder
from expertly.models.layers import moe_layers, own_policy, selection_bias
from expertly.models.loading import open_model, save_model
from expertly.moe.capacity import expert_capacity
from expertly.moe.policy import rule_defaults
from expertly.moe.routing import ROUTERS, tokens_per_expert

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
FOUND = [name for names in families().values() for name in names]
READ = [name for name in FOUND if name in FAMILIES]
UNOPENED = ("switch_transformers",)  # an encoder-decoder, built and watched in Python
each_family = pytest.mark.parametrize("family", READ)
# an older transformers lacks families, and its page would, too
newest = pytest.mark.skipif(
    f"transformers=={version('transformers')}" not in (ROOT / "constraints.txt").read_text(),
    reason="not the transformers of constraints.txt",
)


@cache
def tiny(family):
    return tiny_family(family)


@torch.no_grad()
def output_of(model, ids):
    pair = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(ids, use_cache=False, **pair)[0]


def own(model, **changes):
    return replace(own_policy(model.config.to_dict()), **changes)


@contextmanager
def calls_of_experts(attachment):
    """What each layer's experts are called with, as it happens."""
    calls = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda module, args: calls.append(args))
        for layer in attachment.layers
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_every_decorated_class_belongs_to_a_family_that_is_read_or_refused():
    types = families()
    assert not [name for name in experts_classes() if not types[name]], "no config says experts"
    assert not [name for name in FOUND if name not in FAMILIES and name not in REFUSED]
    assert not set(FAMILIES) & set(REFUSED)


# the decorated classes that no model we read has -> the refused family that has it
OF_REFUSED = {
    "DiffusionGemmaTextExperts": "diffusion_gemma",
    "Ernie4_5_VLMoeMoeExperts": "ernie4_5_vl_moe",
    "InklingExperts": "inkling_text",
    "OpenAIPrivacyFilterExperts": "openai_privacy_filter",
    "Qwen3OmniMoeTalkerTextExperts": "qwen3_omni_moe",
    "ZayaExperts": "zaya",
}


def test_every_decorated_class_is_in_a_model_that_is_read_or_named_with_one_that_is_refused():
    read = {type(layer.experts).__name__ for name in READ for layer in moe_layers(tiny(name))}
    decorated = {name for classes in experts_classes().values() for name in classes}
    assert decorated - read <= set(OF_REFUSED) and not read & set(OF_REFUSED)
    assert set(OF_REFUSED.values()) <= set(REFUSED)


@newest
def test_no_family_is_in_the_table_that_transformers_does_not_have():
    assert {*FAMILIES, *REFUSED} == set(FOUND)


@pytest.mark.parametrize("family", REFUSED)
def test_a_refusal_names_the_family_and_the_reason_in_one_line(family):
    with pytest.raises(ExpertlyError) as refusal:
        require_family({"model_type": family})
    said = str(refusal.value)
    assert refusal.value.code == "E306" and "\n" not in said
    assert repr(family) in said and REFUSED[family] in said


@each_family
def test_its_own_rule_changes_no_bit_and_its_experts_get_what_was_decided(family, tiny_ids):
    model = tiny(family)
    before = output_of(model, tiny_ids)
    with attach(model, own(model)) as attachment, calls_of_experts(attachment) as calls:
        assert output_of(model, tiny_ids).equal(before)
        decisions = attachment.decisions
    assert len({tuple(d.served.experts.flatten().tolist()) for d in decisions}) == len(decisions)
    if FAMILIES[family].answer == "triple":
        for args, decision in zip(calls, decisions, strict=True):
            assert args[1].equal(decision.served.experts)
            assert args[2].equal(decision.served.weights)
    if not model.config.is_encoder_decoder:
        layers = [int(layer.name.split("layers.")[1].split(".")[0]) for layer in attachment.layers]
        assert layers == moe_layer_indices(model.config.to_dict())
    with attach(model) as looking:
        assert output_of(model, tiny_ids).equal(before)
        for seen, made in zip(looking.decisions, decisions, strict=True):
            assert seen.chosen.experts.equal(made.chosen.experts)
            close(seen.chosen.weights, made.chosen.weights)
            close(seen.chosen.logits.softmax(-1), made.chosen.logits.softmax(-1))


@each_family
def test_top_k_is_that_of_a_model_with_this_config(family, tiny_ids):
    row = FAMILIES[family]
    # layers where token ids choose keep the top_k that their table has
    free = {"mlp_layer_types": ["moe"] * 3} if row.unless else {}
    model = tiny_family(family, **free)
    rule = own(model).router
    if row.only_own or row.unless or ROUTERS[rule].top_k:
        pytest.skip(f"{rule} has a top_k of its own, or its config says that of other layers, too")
    said = decoder(model.config.to_dict())[row.top_k]
    other = tiny_family(family, part=row.nested, **free, **{row.top_k: said + 1})
    other.load_state_dict(model.state_dict())
    with attach(model, own(model, top_k=said + 1)) as attachment:
        assert output_of(model, tiny_ids).equal(output_of(other, tiny_ids))
        assert {d.served.experts.shape[1] for d in attachment.decisions} == {said + 1}


@each_family
def test_no_expert_gets_more_than_its_capacity(family, tiny_ids):
    model = tiny(family)
    policy = own(model, eval_capacity_factor=1.0)
    with attach(model, policy) as attachment, calls_of_experts(attachment) as calls:
        output_of(model, tiny_ids)
        decisions = attachment.decisions
    room = expert_capacity(tiny_ids.numel(), policy.top_k, attachment.layers[0].num_experts, 1.0)
    assert max(tokens_per_expert(d.served).max() for d in decisions) <= room
    assert any(not d.served.kept.all() for d in decisions)
    if FAMILIES[family].answer == "triple":
        for args, decision in zip(calls, decisions, strict=True):
            assert not args[2][~decision.served.kept].any()


@pytest.mark.parametrize("family", [n for n in READ if FAMILIES[n].bias])
def test_the_bias_is_the_familys_own_tensor_and_steers(family, tiny_ids):
    model = copy.deepcopy(tiny(family))
    with attach(model, own(model)) as attachment:
        output_of(model, tiny_ids)
        before = attachment.decisions[0].chosen.experts
        first = attachment.bias[0]
        block = attachment.layers[0].block
        assert first.data_ptr() == selection_bias(block, FAMILIES[family].bias).data_ptr()
        first[3] += 10.0
        output_of(model, tiny_ids)
        moved = attachment.decisions[0].chosen.experts
    assert (moved == 3).any(dim=-1).all() and not (before == 3).any(dim=-1).all()


@pytest.mark.parametrize("family", [n for n in READ if n not in UNOPENED])
def test_it_is_saved_and_opened_again_with_its_bias(family, tiny_ids, tmp_path):
    model = copy.deepcopy(tiny(family))
    stock = output_of(model, tiny_ids)
    model.set_experts_implementation(register_experts())
    close(output_of(model, tiny_ids), stock, atol=1e-4, rtol=1e-4)
    with attach(model, own(model)) as attachment:
        for bias in attachment.bias:
            if bias is not None:
                bias[3] += 0.1
        moved = output_of(model, tiny_ids)
        save_model(model, tmp_path, attachment=attachment)
    opened = open_model(tmp_path)
    assert type(opened) is type(model) and output_of(opened, tiny_ids).equal(moved)
    if name := FAMILIES[family].bias:
        for bias, layer in zip(attachment.bias, moe_layers(opened), strict=True):
            kept = selection_bias(layer.block, name)
            assert kept.equal(bias) and kept.dtype == torch.float32
    seen = inspect_folder(tmp_path)
    blocks = [each for each in model.modules() if hasattr(each, "experts")]
    assert (seen.moe_layers, seen.experts) == (len(blocks), 8)
    assert seen.layers == 3
    parts = sizes_by_module(model, FAMILIES[family])
    assert {part: seen.parameters.get(part, 0) for part in parts} == parts


def sizes_by_module(model, row):
    """How many numbers a model saves for each part of its MoE layers."""
    blocks = [each for each in model.modules() if hasattr(each, "experts")]
    shared = re.compile(r"(.+\.)?shared?_(expert|experts|expert_gate|mlp)")
    modules = {
        "experts": [block.experts for block in blocks],
        "router": [getattr(block, row.router) for block in blocks],
        "shared experts": [m for name, m in model.named_modules() if shared.fullmatch(name)],
    }
    found = {part: sum(map(saved, each)) for part, each in modules.items()}
    if row.bias and not row.bias.startswith(f"{row.router}."):  # it lies beside the router
        found["router"] += sum(selection_bias(block, row.bias).numel() for block in blocks)
    return found


def saved(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


# families of which some models have no experts, as their config says it
DENSE = {
    "gemma4_text": {"enable_moe_block": False, "num_experts": None},
    "granitemoehybrid": {"num_local_experts": 0},
    "jamba": {"num_experts": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention"]},
}


@pytest.mark.parametrize("family", DENSE)
def test_its_dense_models_are_opened_as_such(family, tiny_ids, tmp_path):
    model = tiny_family(family, **DENSE[family])
    save_model(model, tmp_path)
    assert output_of(open_model(tmp_path), tiny_ids).equal(output_of(model, tiny_ids))
    assert family_of(model.config.to_dict()) is None
    assert inspect_folder(tmp_path).moe_layers == 0
    with pytest.raises(ExpertlyError, match="E305"):
        attach(model)


@pytest.mark.parametrize("family", [n for n in READ if FAMILIES[n].dense])
def test_its_twin_is_dense_and_has_as_many_active_parameters(family, tiny_ids):
    row = FAMILIES[family]
    moe = sizes(tiny_config(family).to_dict())
    model = tiny_family(family, **({row.dense_width: active_width(moe)} if row.layers else {}))
    twin = build_model(twin_config(model.config)).eval()
    assert not [each for each in twin.modules() if hasattr(each, "experts")]
    assert output_of(twin, tiny_ids).isfinite().all()
    layers = moe_layers(model)
    routers = sum(count(layer.router) for layer in layers)
    experts = sum(count(layer.experts) for layer in layers)
    idle = experts * (moe.num_experts - moe.top_k) // moe.num_experts
    assert count(twin) == pytest.approx(count(model) - routers - idle, rel=0.01)


def count(module):
    return sum(weight.numel() for weight in module.parameters())


# rule option -> another value than a tiny model's config has
OTHER = {
    "renormalize": lambda said: not said,
    "num_groups": lambda said: 1,
    "topk_groups": lambda said: 1,
    "scale": lambda said: 1.7,
    "minimum": lambda said: 0.5,
    "tolerance": lambda said: 0.2,
}


@each_family
def test_its_rule_says_what_the_config_says(family, tiny_ids):
    row = FAMILIES[family]
    said = decoder(tiny(family).config.to_dict())
    variants = [{key: OTHER[option](said[key]) for option, key in row.options.items()}]
    variants += [{key: word} for key, meanings in row.words.items() for word in meanings]
    for changes in filter(None, variants):
        model = tiny_family(family, part=row.nested, **changes)
        before = output_of(model, tiny_ids)
        with attach(model, own(model)):
            assert output_of(model, tiny_ids).equal(before), changes


@newest
def test_the_page_is_what_the_table_says():
    command = "python tests/models/test_models_decorated.py > docs/families.md"
    assert PAGE.read_text() == page(), f"stale: {command}"


RULES = {
    "softmax_topk": "softmax, top k",
    "topk_softmax": "top k, softmax of those",
    "topk_sigmoid": "top k, sigmoid of each",
    "sigmoid_topk": "sigmoid, top k",
    "sparsemixer": "the two best, each weighed among those nearly as good",
    "switch_top1": "softmax, the best one",
    "biased_sigmoid_topk": "sigmoid, top k of score + bias",
    "biased_sqrtsoftplus_topk": "root of softplus, top k of score + bias, sum 1",
    "biased_softmax_topk": "softmax, top k of score + bias, sum 1",
    "biased_topk_sigmoid": "top k of logit + bias, sigmoid of each",
}


def page() -> str:
    """docs/families.md."""
    classes = experts_classes()
    decorated = {name for directory in classes.values() for name in directory}
    own = {name: type(moe_layers(tiny(name))[0].experts).__name__ for name in READ}
    switchable = {name for name in READ if own[name] in decorated}
    intro = f"""# Families

Of the {len(FOUND)} Mixture-of-Experts model types of transformers {version("transformers")}
({sum(map(len, classes.values()))} classes under `@use_experts_implementation`, and those without),
**{len(FAMILIES)} are read and {len(REFUSED)} are refused**; none is guessed. The tests find the
model types in transformers' source, prove each row on a tiny random model, and write this page.

Read means: the family's own rule, attached by our hook, changes no bit in float32; top_k, capacity
and the config's options do what they say; a selection bias is the family's own tensor, and comes
back from disk. Switch Transformers is built and watched in Python; not opened by `open_model`. A
model type whose experts are switchable can run them on our experts function. A twin is a dense
class of the same make.

"""
    read = [_line(FAMILIES[name], name in switchable) for name in sorted(FAMILIES)]
    head = (
        "model_type",
        "rule",
        "experts, top k",
        "always-on experts",
        "bias",
        "switchable",
        "twin",
    )
    refused = [(f"`{name}`", why) for name, why in sorted(REFUSED.items())]
    return (
        intro
        + _table(head, read)
        + "\nRefused, each with E306 and this reason:\n\n"
        + _table(("model_type", "why"), refused)
    )


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _line(row, switchable: bool) -> list[str]:
    keys = (row.num_experts[0], row.top_k)
    shared = (row.shared_experts, row.shared_width)
    return [
        f"`{row.name}`",
        _rule(row),
        ", ".join(f"`{key}`" if isinstance(key, str) else str(key) for key in keys),
        ", ".join(f"`{key}`" for key in shared if key),
        f"`{row.bias}`" if row.bias else "",
        "yes" if switchable else "no",
        f"`{row.dense}`" if row.dense else "",
    ]


def _rule(row) -> str:
    options = {**rule_defaults(ROUTERS[row.rule]), **row.fixed}
    sums = row.options.get("renormalize")
    said = [
        RULES[row.rule],
        "of the best groups" if "num_groups" in row.options else "",
        f"sum 1 if `{sums}`" if sums else "sum 1" if options.get("renormalize") else "",
        f"times `{row.options['scale']}`" if "scale" in row.options else "",
        *(f"or as `{key}` says" for key in row.words),
    ]
    return ", ".join(filter(None, said))


if __name__ == "__main__":
    print(page(), end="")
