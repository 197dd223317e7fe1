"""The experts function on a GPU gives what it gives on the CPU. Run by `make gpu`."""

import pytest
import torch

from expertly.kernels.grouped import combine, dispatch, grouped_linear, sort_by_expert
from expertly.kernels.low_rank import LowRank, low_rank_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(x, experts, weights, up, down):
    order = sort_by_expert(experts, len(up))
    inner = torch.relu(grouped_linear(dispatch(x, order), up, order.counts))
    return combine(grouped_linear(inner, down, order.counts), weights, order)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_forward_and_gradients_equal_the_cpus(top_k):
    torch.manual_seed(0)
    tokens, dim, hidden, num_experts = 512, 64, 128, 16
    shapes = [
        (tokens, dim),
        (tokens, top_k),
        (num_experts, hidden, dim),
        (num_experts, dim, hidden),
    ]
    x, weights, up, down = (torch.randn(shape) / 8 for shape in shapes)
    experts = torch.rand(tokens, num_experts).topk(top_k).indices
    grad = torch.randn(tokens, dim)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [t.to(device, dtype).requires_grad_() for t in (x, weights, up, down)]
        out = layer(inputs[0], experts.to(device), *inputs[1:])
        grads = torch.autograd.grad(out, inputs, grad.to(device, dtype))
        results.append([t.float().cpu() for t in (out, *grads)])
    for cpu, gpu in zip(*results, strict=True):
        assert (cpu - gpu).norm() / cpu.norm() < 0.03


@pytest.mark.parametrize("rank", [3, 8])
def test_low_rank_terms_equal_the_cpus(rank):
    torch.manual_seed(0)
    counts = torch.tensor([100, 0, 300, 112])
    x, a, b = (torch.randn(s) / 8 for s in ((512, 64), (4, rank, 64), (4, 128, rank)))
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        rows = x.to(device, dtype).requires_grad_()
        factors = [t.to(device).requires_grad_() for t in (a, b)]  # adapters stay in float32
        out = low_rank_linear(rows, LowRank(*factors, 2.0), counts.to(device))
        grads = torch.autograd.grad(out, [rows, *factors], torch.ones_like(out))
        results.append([t.float().cpu() for t in (out, *grads)])
    for cpu, gpu in zip(*results, strict=True):
        assert (cpu - gpu).norm() / cpu.norm() < 0.03
