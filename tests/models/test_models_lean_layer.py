"""What is changed or watched inside lean layers counts from the next token on, as in stock ones."""

from copy import deepcopy

import pytest
import torch
from test_models_lean_stack import bare, close, lean_model, leans, opened, stepped, variants
from torch import nn
from transformers import DynamicCache

from expertly.kernels.native import library
from expertly.models.attach import attach
from expertly.models.lean_forward import lean_of
from expertly.models.lean_layer import LeanLayer
from expertly.models.lean_stack import LeanStack
from expertly.moe.policy import Policy

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

# family -> whether each layer's experts are part of its native call
PARTLY = {
    "llama": {"intermediate_size": 96},
    "qwen2_moe": {"num_hidden_layers": 3, "shared_expert_intermediate_size": 32},
    "glm4_moe": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "minimax_m2": {"head_dim": 32},
}


@pytest.mark.parametrize("family", PARTLY)
def test_a_block_that_is_called_behind_the_native_half(family, tiny_ids):
    model = lean_model(family, **PARTLY[family])
    layers = leans(model, LeanLayer)
    assert {lean_of(layer).whole for layer in layers} == {False}
    assert layers == [*model.model.layers]
    assert not leans(model, LeanStack)
    got = stepped(model, tiny_ids)
    assert stepped(variants(model)[2], tiny_ids).equal(got)
    close(got, stepped(bare(model), tiny_ids))
    seen = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    assert stepped(model, tiny_ids).equal(got)
    assert len(seen) == 8 * len(layers)


@torch.inference_mode()
def around(model, change, ids):
    """Logits of two tokens, and of two more after a change."""
    cache, logits = model(ids[:, :5]).past_key_values, []
    for position in range(5, 9):
        if position == 7:
            change(model)
        logits.append(model(ids[:, position : position + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def check(change, ids, *, family="qwen3_moe"):
    """A change is seen alike."""
    stack, layers, parts = variants(lean_model(family))
    want = around(parts, change, ids)
    assert around(layers, change, ids).equal(want)
    assert around(stack, change, ids).equal(want)
    return want


def inner(model):
    return model.model.layers[1]


INSIDE = (
    *("", "self_attn", "mlp", "mlp.gate", "mlp.experts", "mlp.experts.act_fn"),
    *("input_layernorm", "post_attention_layernorm"),
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
)


def scaled(answer):
    if torch.is_tensor(answer):
        return answer * 1.5
    return tuple(
        scaled(each) if each.is_floating_point() else each for each in answer if each is not None
    )


@pytest.mark.parametrize("name", INSIDE)
def test_hooks_are_called_and_change_what_they_will(name, tiny_ids):
    counts = []

    def watch(model):
        seen = []
        counts.append(seen)
        module = inner(model).get_submodule(name)
        module.register_forward_pre_hook(lambda *_: seen.append(1))

    def change(model):
        module = inner(model).get_submodule(name)
        if name == "self_attn":
            module.register_forward_hook(lambda *given: (scaled(given[-1][0]), given[-1][1]))
        else:
            module.register_forward_hook(lambda *given: scaled(given[-1]))

    check(watch, tiny_ids)
    assert len({len(seen) for seen in counts}) == 1
    assert counts[0]
    check(change, tiny_ids)


@pytest.mark.parametrize("name", INSIDE[1:])
def test_a_forward_of_somebody_elses_is_called(name, tiny_ids):
    def change(model):
        module = inner(model).get_submodule(name)
        own = module.forward

        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            return (scaled(out[0]), None) if name == "self_attn" else scaled(out)

        module.forward = forward

    check(change, tiny_ids)


def set_to(path, value):
    *names, last = path.split(".")
    return lambda model: setattr(inner(model).get_submodule(".".join(names)), last, value)


def filled(*names):
    def change(model):
        for tensor in tensors(model, names):
            tensor.copy_(tensor.roll(1))

    return change


def moved(*names):
    def change(model):
        for tensor in tensors(model, names):
            tensor.data = tensor.roll(1)

    return change


def tensors(model, names):
    held = dict(inner(model).named_parameters()) | dict(inner(model).named_buffers())
    return [held[name] for name in names]


WEIGHTS = {
    "norm": ("input_layernorm.weight",),
    "second norm": ("post_attention_layernorm.weight",),
    "q_norm": ("self_attn.q_norm.weight",),
    "router": ("mlp.gate.weight",),
    "projection": ("self_attn.o_proj.weight_data", "self_attn.o_proj.weight_scales"),
    "experts": ("mlp.experts.packed.gate_up_data", "mlp.experts.packed.down_scales"),
}


def swapped(path):
    """The first layer's module in the place of the second's."""

    def change(model):
        *names, last = path.split(".")
        other = deepcopy(model.model.layers[0].get_submodule(path))
        setattr(inner(model).get_submodule(".".join(names)), last, other)

    return change


def bf16_bias(model):
    inner(model).self_attn.q_proj.bias = nn.Parameter(torch.ones(128), requires_grad=False)


def loaded(model):
    model.load_state_dict(
        {k: v.roll(1) if "norm" in k else v for k, v in model.state_dict().items()}
    )


def strided(name):
    def change(model):
        owner, _, last = name.rpartition(".")
        module = inner(model).get_submodule(owner)
        wide = torch.stack([getattr(module, last).roll(1)] * 2, dim=-1)
        setattr(module, last, nn.Parameter(wide[..., 0], requires_grad=False))

    return change


CHANGES = {
    "top_k": set_to("mlp.gate.top_k", 3),
    "norm_topk_prob": lambda m: setattr(
        g := inner(m).mlp.gate, "norm_topk_prob", not g.norm_topk_prob
    ),
    "act_fn": set_to("mlp.experts.act_fn", nn.ReLU()),
    "another act_fn": set_to("mlp.experts.act_fn", nn.Softplus()),
    "eps": set_to("input_layernorm.variance_epsilon", 1.0),
    "q_norm's eps": set_to("self_attn.q_norm.variance_epsilon", 1.0),
    "scaling": set_to("self_attn.scaling", 0.9),
    "a bias": bf16_bias,
    "load_state_dict": loaded,
    "the layers' order": lambda m: setattr(m.model, "layers", nn.ModuleList(m.model.layers[::-1])),
    "a layer twice": lambda m: m.model.layers.__setitem__(1, m.model.layers[0]),
    "fewer layers": lambda m: m.model.layers.__delitem__(1),
    "fewer by the config": lambda m: setattr(m.config, "num_hidden_layers", 1),
    "a forward of the last norm": lambda m: m.model.norm.register_forward_hook(
        lambda *g: scaled(g[-1])
    ),
    **{f"{name} in place": filled(*names) for name, names in WEIGHTS.items()},
    **{f"{name} elsewhere": moved(*names) for name, names in WEIGHTS.items()},
    **{
        f"another {path}": swapped(path)
        for path in INSIDE[1:]
        if path not in ("self_attn", "mlp.experts.act_fn")
    },
    **{f"{names[0]} strided": strided(names[0]) for key, names in WEIGHTS.items() if "norm" in key},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_counts_from_the_next_token_on(change, tiny_ids):
    before = around(opened("qwen3_moe"), lambda _: None, tiny_ids)
    after = check(change, tiny_ids)
    assert after[:, :2].equal(before[:, :2])
    assert not after[:, 2:].equal(before[:, 2:])


# a setting, its family and owner, and what it is set to
OUTSIDE = [
    ("embedding_multiplier", "granitemoe", lambda model: model.model, 2.0),
    ("residual_multiplier", "granitemoe", inner, 2.0),
    ("sliding_window", "mixtral", lambda model: model.config, 4),
]


@pytest.mark.parametrize(("name", "family", "owner", "value"), OUTSIDE)
def test_settings_beside_the_parts_count(name, family, owner, value, tiny_ids):
    before = around(opened(family), lambda _: None, tiny_ids)
    change = lambda model: setattr(owner(model), name, value)  # noqa: E731
    assert not check(change, tiny_ids, family=family).equal(before)


NO_MATTER = {
    "training": lambda model: model.train(),
    "a layer's training": lambda model: inner(model).train(),
    "a router's training": lambda model: inner(model).mlp.gate.train(),
    "the experts' implementation": lambda model: model.set_experts_implementation("expertly"),
}


@pytest.mark.parametrize("change", NO_MATTER.values(), ids=NO_MATTER)
def test_the_stock_code_where_it_must_run(change, tiny_ids):
    model = lean_model("qwen3_moe")
    close(around(model, change, tiny_ids), around(bare(model), change, tiny_ids))


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_gradients_autocast_and_other_dtypes_are_for_the_parts(family, tiny_ids):
    answers = []
    for model in variants(lean_model(family, **PARTLY.get(family, {}))):
        stepped(model, tiny_ids[:, :7])
        token, past = tiny_ids[:, :1], {"past_key_values": DynamicCache(config=model.config)}
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = [model(token, **past).logits]
        logits.append(model(token, **past).logits)
        assert logits[-1].requires_grad
        with torch.no_grad():
            logits.append(model(token, **past).logits)
            if family == "llama":
                x = model.model.embed_tokens(token).float()
                past = {"past_key_values": DynamicCache(config=model.config)}
                logits += [model(inputs_embeds=x, **past).logits for _ in range(2)]
            logits.append(stepped(model.float(), tiny_ids[:, :7])[:, -1:])
        answers.append(torch.cat([each.detach().float() for each in logits]))
    assert answers[0].equal(answers[2])
    assert answers[1].equal(answers[2])


def test_a_policy_decides(tiny_ids):
    policy, answers = Policy(router="softmax_topk", top_k=3), []
    for model in variants(lean_model("olmoe")):
        before = stepped(model, tiny_ids)
        with attach(model, policy) as attached:
            answers.append(stepped(model, tiny_ids))
            assert attached.decisions[1].served.experts.shape[-1] == 3
        assert not answers[-1].equal(before)
        assert stepped(model, tiny_ids).equal(before)
    assert answers[0].equal(answers[1])
    assert answers[0].equal(answers[2])
