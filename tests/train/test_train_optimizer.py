"""Parameter groups: who decays, who has which rate."""

import pytest
import torch
from torch import nn

from expertly.train.config import OptimConfig
from expertly.train.optimizer import build_optimizer, clip, set_learning_rate


def routers(attachment) -> list[nn.Module]:
    return [layer.router for layer in attachment.layers]


def settings(model, optimizer) -> dict[str, dict]:
    """By name, a parameter's rate, its decay, and in how many groups it is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            times = found.get(name, {"times": 0})["times"] + 1
            found[name] = {"lr": group["lr"], "decay": group["weight_decay"], "times": times}
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_every_parameter_in_exactly_one_group(tiny, family):
    model, attachment = tiny(family)
    optim = OptimConfig(learning_rate=0.1, router_learning_rate=0.01, weight_decay=0.3)
    found = settings(model, build_optimizer(model, routers(attachment), optim))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert found[name]["times"] == 1
        assert found[name]["lr"] == (0.01 if ".mlp.gate." in name else 0.1), name
        assert found[name]["decay"] == (0.3 if parameter.dim() > 1 else 0), name
    assert sum(".mlp.gate." in name for name in found) == 2


def test_tied_embeddings_are_stepped_once(tiny):
    model, attachment = tiny("qwen3_moe", tie_word_embeddings=True)
    optimizer = build_optimizer(model, routers(attachment), OptimConfig())
    found = settings(model, optimizer)
    assert "lm_head.weight" not in found
    assert all(each["times"] == 1 for each in found.values())


def test_no_decay_on_biases_even_of_stacked_experts():
    model = nn.Module()
    model.gate_up_proj = nn.Parameter(torch.ones(4, 3, 2))
    model.gate_up_proj_bias = nn.Parameter(torch.ones(4, 3))
    model.norm = nn.LayerNorm(3)
    model.router = nn.Linear(3, 4)
    found = settings(model, build_optimizer(model, [model.router], OptimConfig(weight_decay=0.3)))
    decays = {name for name, each in found.items() if each["decay"]}
    assert decays == {"gate_up_proj", "router.weight"}
    assert len(found) == 6


def test_rates_are_scaled_from_their_own_base(tiny):
    model, attachment = tiny("qwen3_moe")
    optim = OptimConfig(learning_rate=0.1, router_learning_rate=0.01)
    optimizer = build_optimizer(model, routers(attachment), optim)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
        found = settings(model, optimizer)
        assert found["model.layers.0.mlp.gate.weight"]["lr"] == pytest.approx(0.01 * factor)
        assert found["model.embed_tokens.weight"]["lr"] == pytest.approx(0.1 * factor)


def test_the_routers_rate_is_everyones_unless_given(tiny):
    model, attachment = tiny("qwen3_moe")
    found = settings(model, build_optimizer(model, routers(attachment), OptimConfig()))
    assert {each["lr"] for each in found.values()} == {OptimConfig().learning_rate}


def test_rate_0_freezes_the_routers(tiny):
    model, attachment = tiny("qwen3_moe")
    before = [router.weight.clone() for router in routers(attachment)]
    optim = OptimConfig(router_learning_rate=0, weight_decay=0.3)
    optimizer = build_optimizer(model, routers(attachment), optim)
    model(torch.arange(8).unsqueeze(0)).logits.sum().backward()
    optimizer.step()
    for router, was in zip(routers(attachment), before, strict=True):
        assert router.weight.grad is None
        assert torch.equal(router.weight, was), "not even decayed"
    assert model.model.embed_tokens.weight.grad is not None


def test_clip_returns_the_norm_before():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip(layer, 0) == 5
    assert layer.weight.grad.tolist() == [[3, 4]], "0: no clipping"
    assert clip(layer, 1) == 5
    assert layer.weight.grad.norm() == pytest.approx(1)
