"""A decoder walked layer by layer: what transformers' own forward computes, one layer at a time."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertly.families import FAMILIES
from expertly.models import walk as module
from expertly.models.build import build_model, model_config
from expertly.models.walk import Head, compare, walk

IDS = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(3))
SLIDING = {"sliding_window": 7, "use_sliding_window": True}
DENSE = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("mistral", {"sliding_window": 7}, id="mistral-window"),
    pytest.param(
        "qwen2",
        {**SLIDING, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        id="qwen2-some-windows",
    ),
    pytest.param("qwen3", {**SLIDING, "layer_types": ["sliding_attention"] * 3}, id="qwen3-window"),
    pytest.param("gemma", {"head_dim": 8}, id="gemma"),
    pytest.param("olmo2", {}, id="olmo2"),
]
MOE = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "flex_olmo"]
DENSE_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


class Held:
    """A model's parameters as walk wants them, and which of them were asked for."""

    def __init__(self, model):
        self.tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.asked = []

    def tensor(self, name):
        self.asked.append(name)
        return self.tensors[name]

    def rows(self, name, start, stop):
        return self.tensors[name][start:stop]

    def gather(self, name, indices):
        return self.tensors[name][indices]


def dense(family, *, seed=0, **keys):
    torch.manual_seed(seed)
    model = build_model(model_config(family, {**DENSE_SIZES, **keys})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def fed(model):
    """What transformers' own forward gives each feed-forward, its hidden states, and logits."""
    seen, handles = [], []
    for layer in model.model.layers:
        hook = layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        handles.append(hook)
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return [each.flatten(0, -2) for each in seen], out.hidden_states[1:], out.logits


def require_same_walk(model, atol=1e-5):
    states, hidden, _ = fed(model)
    passed = list(walk(model.config, Held(model), IDS))
    assert [each.layer for each in passed] == [*range(len(hidden))]
    for each, wanted_states, wanted in zip(passed, states, hidden, strict=True):
        torch.testing.assert_close(each.states, wanted_states, atol=atol, rtol=1e-5)
        torch.testing.assert_close(torch.stack(each.hidden), wanted, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("family", "keys"), DENSE)
def test_every_dense_make_is_walked_as_transformers_runs_it(family, keys):
    require_same_walk(dense(family, **keys))


@pytest.mark.parametrize("family", MOE)
def test_every_moe_target_is_walked_as_transformers_runs_it(family, tiny_model):
    model = tiny_model(family)
    assert model.config.model_type in FAMILIES
    require_same_walk(model)


def test_weights_of_any_float_are_walked_in_float32(tmp_path):
    dense("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    half = Held(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    *_, last = walk(model.config, half, IDS)
    hidden = torch.stack(last.hidden)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, fed(model)[1][-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "keys"), DENSE)
def test_rows_of_several_lengths_are_walked_as_each_would_be_alone(family, keys):
    """None is padded: masks, windows and positions are those of its own length."""
    model, rows = dense(family, **keys), [IDS[0], IDS[1, :9], IDS[2, :1], IDS[2, :9]]
    alone = [list(walk(model.config, Held(model), [row])) for row in rows]
    for together, *each in zip(walk(model.config, Held(model), rows), *alone, strict=True):
        assert torch.equal(together.states, torch.cat([one.states for one in each]))
        assert all(map(torch.equal, together.hidden, [one.hidden[0] for one in each]))


def test_a_layer_sees_one_row_at_a_time(monkeypatch):
    model, seen = dense("llama"), []

    def build(shape):
        made = build_model(shape)
        for layer in made.model.layers:
            layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        return made

    monkeypatch.setattr(module, "build_model", build)
    list(walk(model.config, Held(model), IDS))
    assert seen == [(1, 24, 32)] * 9, "3 rows, 3 layers"


def test_one_layers_parameters_are_in_memory_at_a_time(monkeypatch):
    model, kept = dense("llama"), []

    def build(shape):
        made = build_model(shape)
        kept.extend(made.model.layers)
        return made

    def there():
        return [i for i, layer in enumerate(kept) if any(not p.is_meta for p in layer.parameters())]

    class Watched(Held):
        def tensor(self, name):
            assert there() == [], "the layer before is still there"
            return super().tensor(name)

    monkeypatch.setattr(module, "build_model", build)
    held = Watched(model)
    for passed in walk(model.config, held, IDS):
        assert there() == [], "a layer that was passed is let go"
        assert f"model.layers.{passed.layer}.mlp.up_proj.weight" in held.asked
        assert f"model.layers.{passed.layer + 1}.mlp.up_proj.weight" not in held.asked
    assert len(held.asked) == len(set(held.asked)), "each tensor is read once"
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & {*held.asked}


# --- Comparing ---------------------------------------------------------------------------------


def compared(*models):
    hidden, heads = [], []
    for model in models:
        held = Held(model)
        *_, last = walk(model.config, held, IDS)
        hidden.append(last.hidden)
        heads.append(Head(held, "lm_head.weight"))
    return compare(hidden, heads, 300, IDS)


@pytest.mark.parametrize("words", [64, 299, 4096])
def test_two_models_are_compared_as_all_of_their_logits_would_be(words, monkeypatch):
    monkeypatch.setattr(module, "_VOCABULARY", words)
    one, other = dense("llama"), dense("llama", seed=1)
    logits = [fed(model)[2].double() for model in (one, other)]
    losses = [
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        for x in logits
    ]
    found = compared(one, other)
    assert found.largest == pytest.approx(float((logits[0] - logits[1]).abs().max()), rel=1e-5)
    assert found.scale == pytest.approx(float(logits[0].abs().max()), rel=1e-5)
    assert found.losses == pytest.approx([float(loss) for loss in losses], rel=1e-5)


def test_a_model_and_itself():
    model = dense("llama")
    found = compared(model, model)
    assert found.largest == 0
    assert found.losses[0] == found.losses[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_no_small_difference(bad):
    """Also at the last position, which has no next token and so no part in the losses."""
    hidden = torch.ones(1, 4, 8)
    spoilt = hidden.clone()
    spoilt[0, -1] = bad
    ids, head = torch.tensor([[1, 2, 3, 4]]), Head(Held(dense("llama", hidden_size=8)), "h")
    head.weights.tensors["h"] = torch.randn(300, 8)
    found = compare([hidden, spoilt], [head, head], 300, ids)
    assert all(map(math.isfinite, found.losses))
    assert not found.largest <= 1e9
