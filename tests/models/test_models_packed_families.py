"""The experts of every family that transformers decorates run packed and compute the same."""

from functools import cache

import pytest
import torch
from tiny_families import families, tiny_family

from expertly.families import FAMILIES
from expertly.kernels.experts import experts_forward
from expertly.kernels.packed_experts import pack_experts, replace_experts

READ = [name for names in families().values() for name in names if name in FAMILIES]


@cache
def experts_of(family):
    """The family's decorated experts modules, in bfloat16."""
    modules = tiny_family(family).modules()
    return [module.bfloat16() for module in modules if hasattr(module, "is_concatenated")]


def inputs(experts, width):
    torch.manual_seed(0)
    index = torch.rand(40, experts).topk(2).indices
    return torch.randn(40, width).bfloat16(), index, torch.rand(40, 2).bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("family", READ)
def test_16_bits_equal_the_stock_experts_in_bfloat16(family):
    if not experts_of(family):
        pytest.skip("its experts are not behind transformers' seam")
    experts = experts_of(family)[-1]
    packed = pack_experts(experts, 16)
    given = inputs(packed.num_experts, packed.dim)
    experts.config._experts_implementation = "eager"
    stock = experts(*given)
    experts.float()
    exact = experts(given[0].float(), *given[1:])
    replace_experts(experts, packed)
    ours = experts_forward(experts, *given)
    assert ours.shape == stock.shape and ours.dtype == stock.dtype == torch.bfloat16
    error, theirs = ((out.float() - exact).norm() / exact.norm() for out in (ours, stock))
    assert error < max(1.2 * theirs, 3e-3) and theirs < 1e-2
