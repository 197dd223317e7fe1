"""Our experts function against its definition and against transformers' own back-ends, on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.integrations.moe import (
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from expertly.kernels.experts import experts_forward
from expertly.moe.routing import drop, softmax_topk

DIM, HIDDEN, EXPERTS = 16, 24, 8


def mixtral():
    config = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
    return filled(MixtralExperts, config)


def gpt_oss():
    config = GptOssConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
    return filled(GptOssExperts, config)


def nemotron():  # no gate: up, activation, down
    config = NemotronHConfig(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS
    )
    return filled(NemotronHExperts, config)


def filled(kind, config):
    config._experts_implementation = "eager"
    experts = kind(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def inputs(top_k, tokens=17, experts=EXPERTS):
    """Tokens, and a routing that leaves the last expert without any."""
    torch.manual_seed(1)
    x = torch.randn(tokens, DIM, requires_grad=True)
    logits = torch.randn(tokens, experts)
    logits[:, -1] = -50
    routing = softmax_topk(logits, top_k)
    return x, routing.experts, routing.weights.requires_grad_()


def gradients(out, x, weights, experts):
    given = [x, weights, *experts.parameters()]
    torch.manual_seed(2)
    return torch.autograd.grad(out, given, torch.randn_like(out))


def double_loop(experts, x, index, weights):
    """The definition of Mixtral's experts, one token and one expert at a time."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(index[t], weights[t], strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
            out[t] += w * (experts.down_proj[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_output_and_every_gradient_equal_the_double_loop(top_k):
    experts = mixtral()
    x, index, weights = inputs(top_k)
    ours, loop = (f(experts, x, index, weights) for f in (experts_forward, double_loop))
    torch.testing.assert_close(ours, loop)
    for a, b in zip(*(gradients(out, x, weights, experts) for out in (ours, loop)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def eager(experts, x, index, weights):
    return experts(x, index, weights)


STOCK = [eager, grouped_mm_experts_forward, batched_mm_experts_forward]


@pytest.mark.parametrize("stock", STOCK, ids=["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
def test_equal_to_the_stock_back_ends_with_every_gradient(make, stock):
    experts = make()
    x, index, weights = inputs(top_k=3)
    ours, theirs = (f(experts, x, index, weights) for f in (experts_forward, stock))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(gradients(out, x, weights, experts) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
def test_an_expert_nobody_chose_gets_exactly_zero_gradient(make):
    experts = make()
    x, index, weights = inputs(top_k=2)
    assert EXPERTS - 1 not in index
    grads = gradients(experts_forward(experts, x, index, weights), x, weights, experts)[2:]
    assert all((grad[-1] == 0).all() for grad in grads)
    assert all(grad[:-1].abs().sum() > 0 for grad in grads)


def test_a_dropped_assignment_was_never_there_to_the_last_bit():
    # the second choice is always expert 7, and always dropped
    experts = mixtral()
    x, index, weights = inputs(top_k=1)
    chosen = softmax_topk(torch.zeros(len(x), EXPERTS), 2)._replace(
        experts=torch.cat([index, torch.full_like(index, EXPERTS - 1)], dim=1),
        weights=torch.cat([weights, torch.full_like(weights, 0.5)], dim=1),
    )
    dropped = drop(chosen, torch.tensor([True, False]).expand(len(x), 2))
    alone = experts_forward(experts, x, index, weights)
    expected = gradients(alone, x, weights, experts)
    with torch.no_grad():
        experts.down_proj[-1].mul_(100)
    out = experts_forward(experts, x, dropped.experts, dropped.weights)
    assert torch.equal(out, alone)
    for ours, theirs in zip(gradients(out, x, weights, experts), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_token_that_lost_every_expert_gets_zero():
    experts = mixtral()
    x, index, weights = inputs(top_k=2)
    mask = torch.ones_like(weights)
    mask[3] = 0
    out = experts_forward(experts, x, index, weights * mask)
    assert (out[3] == 0).all() and (out[4] != 0).all()


def test_the_same_expert_twice_counts_twice():
    # expert parallel calls it so, and a rerouted token may keep a dropped id
    experts = mixtral()
    x, index, weights = inputs(top_k=1)
    twice = experts_forward(experts, x, index.expand(-1, 2), weights.expand(-1, 2) / 2)
    torch.testing.assert_close(twice, experts_forward(experts, x, index, weights))


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
def test_no_token_at_all(make):
    experts = make()
    x = torch.zeros(0, DIM, requires_grad=True)
    index, weights = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, requires_grad=True)
    out = experts_forward(experts, x, index, weights)
    assert out.shape == (0, DIM)
    grads = torch.autograd.grad(out.sum(), [x, *experts.parameters()])
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
def test_autocast_casts_the_weights_and_keeps_their_gradients_float32(make):
    experts = make()
    x, index, weights = inputs(top_k=2)
    full = experts_forward(experts, x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts_forward(experts, x, index, weights)
        half = experts_forward(experts, x.bfloat16(), index, weights)
    assert (out.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    for rounded in (out, half.float()):
        assert (rounded - full).norm() / full.norm() < 0.02
    assert not torch.equal(out, full)
    pairs = zip(*(gradients(result, x, weights, experts) for result in (out, full)), strict=True)
    for ours, exact in pairs:
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() / exact.norm() < 0.03


def test_bfloat16_is_as_close_to_float32_as_the_stock_back_end():
    experts = mixtral()
    x, index, weights = inputs(top_k=2, tokens=200)
    exact = experts_forward(experts, x, index, weights)
    experts.bfloat16()
    errors = [
        (f(experts, x.bfloat16(), index, weights).float() - exact).norm() / exact.norm()
        for f in (experts_forward, grouped_mm_experts_forward)
    ]
    assert errors[0] < 1.2 * errors[1] < 0.02


def test_the_same_inputs_give_the_same_bits():
    experts = mixtral()
    x, index, weights = inputs(top_k=4, tokens=64)
    first, again = (experts_forward(experts, x, index, weights) for _ in range(2))
    assert torch.equal(first, again)
    for a, b in zip(*(gradients(out, x, weights, experts) for out in (first, again)), strict=True):
        assert torch.equal(a, b)
