"""The gate: SwiGLU as one step to the last bit, and when it is left to the module's own code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import expertly.kernels.gate as kernels_gate
from expertly.kernels.experts import experts_forward
from expertly.kernels.gate import apply_gate, swiglu

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4}


def mixtral(activation="silu"):
    config = MixtralConfig(**SIZES, hidden_act=activation)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def plain(inner):
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.fixture
def fused(monkeypatch):
    """How often the gate ran as one step."""
    calls = []
    monkeypatch.setattr(kernels_gate, "swiglu", lambda x: calls.append(x) or swiglu(x))
    return calls


def test_gradient_in_double_precision():
    torch.manual_seed(0)
    inner = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, inner)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_the_same_bits_as_autograds(dtype, rows):
    torch.manual_seed(0)
    inner = torch.randn(rows, 40).to(dtype).requires_grad_()
    grad = torch.randn(rows, 20).to(dtype)
    ours, theirs = swiglu(inner), plain(inner)
    assert torch.equal(ours, theirs)
    pair = [torch.autograd.grad(out, inner, grad)[0] for out in (ours, theirs)]
    assert torch.equal(*pair) and pair[0].dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
def test_an_experts_module_gives_the_same_bits_with_and_without_it(autocast, fused, monkeypatch):
    experts = mixtral()
    torch.manual_seed(1)
    x = torch.randn(19, 16, requires_grad=True)
    index, weights = torch.randn(19, 3).topk(2).indices, torch.rand(19, 2)  # expert 3 is idle
    results = []
    for one_step in (True, False):
        if not one_step:
            monkeypatch.setattr(kernels_gate, "_is_swiglu", lambda experts: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = experts_forward(experts, x, index, weights)
        results.append([out, *torch.autograd.grad(out.sum(), [x, *experts.parameters()])])
    assert len(fused) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_hook_on_the_activation_is_heard(fused):
    # expert dropout is such a hook
    experts, inner = mixtral(), torch.randn(3, 48)
    handle = experts.act_fn.register_forward_hook(lambda module, args, output: 0 * output)
    assert (apply_gate(experts, inner) == 0).all() and not fused
    handle.remove()
    assert torch.equal(apply_gate(experts, inner), plain(inner)) and len(fused) == 1


def test_another_activation_or_gate_is_the_modules_own(fused):
    experts, inner = mixtral("gelu"), torch.randn(3, 48)
    gate, up = inner.chunk(2, dim=-1)
    assert torch.equal(apply_gate(experts, inner), F.gelu(gate) * up)
    gpt_oss = GptOssExperts(GptOssConfig(**SIZES))
    assert torch.equal(apply_gate(gpt_oss, inner), gpt_oss._apply_gate(inner))
    assert not fused
