"""Dispatch, grouped linear and combine: moves that invert each other, and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.kernels.grouped import combine, dispatch, grouped_linear, sort_by_expert


def random_experts(tokens, top_k, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 5), st.integers(5, 9), st.integers(0, 1000))
def test_the_order_groups_assignments_by_expert_and_keeps_token_order(tokens, top_k, experts, seed):
    chosen = random_experts(tokens, top_k, experts, seed)
    order = sort_by_expert(chosen, experts)
    assert order.packed[order.slots].flatten().tolist() == list(range(tokens * top_k))
    assert order.slots.shape == chosen.shape
    assert order.tokens.tolist() == [slot // top_k for slot in order.packed.tolist()]
    packed = chosen.flatten()[order.packed].tolist()
    assert packed == sorted(packed)
    assert order.counts.tolist() == [packed.count(e) for e in range(experts)]
    for expert in range(experts):
        slots = [s for s, e in zip(order.packed.tolist(), packed, strict=True) if e == expert]
        assert slots == sorted(slots)


def test_dispatch_and_combine_are_each_others_inverse():
    torch.manual_seed(0)
    x, experts = torch.randn(11, 6), random_experts(11, 2, 4)
    order = sort_by_expert(experts, 4)
    packed = dispatch(x, order)
    assert torch.equal(packed, x.repeat_interleave(2, dim=0)[order.packed])
    torch.testing.assert_close(combine(packed, torch.full((11, 2), 0.5), order), x)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients_in_double_precision(top_k):
    torch.manual_seed(0)
    experts = random_experts(5, top_k, 4)
    order = sort_by_expert(experts, 4)
    rows = 5 * top_k
    assert torch.autograd.gradcheck(lambda x: dispatch(x, order), double(5, 3))
    assert torch.autograd.gradcheck(
        lambda packed, weights: combine(packed, weights, order), (double(rows, 3), double(5, top_k))
    )
    assert torch.autograd.gradcheck(
        lambda x, weight: grouped_linear(x, weight, order.counts),
        (double(rows, 3), double(4, 2, 3)),
    )


def test_gradients_of_transposed_weights():
    torch.manual_seed(0)
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(
        lambda x, weight: grouped_linear(x, weight.mT, counts), (double(5, 3), double(3, 3, 2))
    )


def test_grouped_linear_is_one_linear_per_expert():
    torch.manual_seed(0)
    x, weight, counts = torch.randn(9, 4), torch.randn(5, 3, 4), torch.tensor([0, 4, 0, 5, 0])
    expected = torch.cat([x[:4] @ weight[1].T, x[4:] @ weight[3].T])
    torch.testing.assert_close(grouped_linear(x, weight, counts), expected)


def test_an_expert_without_tokens_gets_exactly_zero_gradient():
    x, weight = torch.randn(4, 3), torch.randn(3, 2, 3, requires_grad=True)
    for counts in ([4, 0, 0], [0, 0, 4], [0, 4, 0]):
        out = grouped_linear(x, weight, torch.tensor(counts))
        (grad,) = torch.autograd.grad(out.sum(), weight)
        idle = [expert for expert, count in enumerate(counts) if count == 0]
        assert (grad[idle] == 0).all() and grad.isfinite().all()


def test_frozen_inputs_get_no_gradient_and_the_others_theirs():
    torch.manual_seed(0)
    counts = torch.tensor([3, 2])
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    both = torch.autograd.grad(grouped_linear(x, weight, counts).sum(), (x, weight))
    (only_x,) = torch.autograd.grad(grouped_linear(x, weight.detach(), counts).sum(), x)
    (only_weight,) = torch.autograd.grad(grouped_linear(x.detach(), weight, counts).sum(), weight)
    assert torch.equal(only_x, both[0]) and torch.equal(only_weight, both[1])


def test_the_routers_gradient_keeps_its_precision_under_bfloat16():
    torch.manual_seed(0)
    experts = random_experts(64, 2, 4)
    order = sort_by_expert(experts, 4)
    packed, grad = torch.randn(128, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    weights = torch.rand(64, 2, requires_grad=True)
    (ours,) = torch.autograd.grad(combine(packed, weights, order), weights, grad)
    spread = grad.double().repeat_interleave(2, dim=0)[order.packed]
    exact = (spread * packed.double()).sum(-1)[order.slots]
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() / exact.norm() < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_multiplies_few_numbers_of_rows(dtype, monkeypatch):
    # oneDNN builds a kernel for each new one; a single row, as in decoding, stays alone
    torch.manual_seed(0)
    shapes, mm = set(), torch.mm

    def spy(a, b, **out):
        shapes.update(a.shape + b.shape)
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", spy)
    counts = torch.tensor([1, 0, 63, 64, 65, 7])
    x, weight = torch.randn(200, 16), torch.randn(6, 32, 16) / 4
    grad = torch.randn(200, 32)
    results = []
    for kind in (torch.float64, dtype):
        shapes.clear()
        inputs = [x.to(kind).requires_grad_(), weight.to(kind).requires_grad_()]
        out = grouped_linear(*inputs, counts)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(kind))])
    assert shapes == {0, 1, 8, 16, 32, 64, 128}
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == dtype and rounded.shape == exact.shape
        assert (rounded.double() - exact).norm() / exact.norm() < 0.01
    assert (results[1][2][1] == 0).all()


def test_no_second_derivative_instead_of_a_wrong_one():
    x = torch.randn(3, 2, requires_grad=True)
    order = sort_by_expert(random_experts(3, 1, 2), 2)
    (grad,) = torch.autograd.grad((dispatch(x, order) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
