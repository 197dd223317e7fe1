"""Lean norms round where the stock ones round, number for number, and step back elsewhere."""

from copy import copy

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from expertly.kernels.native import library
from expertly.models.lean_forward import same
from expertly.models.lean_norm import lean_norm

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

NORMS = {
    MixtralRMSNorm: (0.0, False),
    Gemma4RMSNorm: (0.0, True),
    DeepseekV4RMSNorm: (0.0, True),
    Qwen3NextRMSNorm: (1.0, True),
}
BOTH = (torch.float32, torch.bfloat16)
each_norm = pytest.mark.parametrize("kind", NORMS)


def numbers(*shape, dtype=torch.bfloat16, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(kind, dim=96, dtype=torch.bfloat16):
    norm = kind(dim, eps=1e-5).to(dtype)
    norm.weight.data = 1 + numbers(dim, dtype=dtype, seed=4) / 3
    return norm


def bound(norm, dtype):
    """The lean forward of a norm, bound to it."""
    lean = lean_norm(norm, library(), dtype)
    if lean is not None:
        lean.bind(norm)
    return lean


@each_norm
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("weight_dtype", BOTH)
@pytest.mark.parametrize("dim", [8, 96, 1000])
@torch.inference_mode()
def test_it_answers_number_for_number_and_in_the_stock_dtype(kind, dtype, weight_dtype, dim):
    norm = norm_of(kind, dim, weight_dtype)
    lean = bound(norm, dtype)
    x = numbers(40, dim, dtype=dtype)
    x[::2] /= 500  # eps counts
    want, got = kind.forward(norm, x), norm(x)
    assert got.dtype == want.dtype
    assert (got != want).float().mean() <= (0.01 if want.dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(
        got, want, rtol=8e-3 if want.dtype != torch.float32 else 2e-6, atol=0
    )
    if dtype == weight_dtype == torch.bfloat16:
        assert (lean.offset, lean.once) == NORMS[kind]


@torch.inference_mode()
def test_one_rounding_more_is_another_norm():
    x = numbers(100, 96)
    norm, twice = norm_of(Gemma4RMSNorm), norm_of(MixtralRMSNorm)
    twice.variance_epsilon = norm.eps
    assert not same(twice(x), norm(x))
    assert same(norm(x), norm(x).clone())


@each_norm
@torch.inference_mode()
def test_another_dtype_later_is_the_stock_code(kind):
    norm = norm_of(kind, dtype=torch.float32)
    bound(norm, torch.float32)
    norm.to(torch.bfloat16)
    x = numbers(50, 96)
    assert norm(x).equal(kind.forward(norm, x))


@each_norm
@torch.inference_mode()
def test_another_eps_later_is_followed(kind):
    norm = norm_of(kind)
    assert bound(norm, torch.bfloat16) is not None
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            setattr(norm, name, 0.5)
    x = numbers(50, 96)
    assert norm(x).equal(kind.forward(norm, x))


class _Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6


class TwiceRMSNorm(_Norm):
    """Named as a norm, and none."""

    def forward(self, x):
        return 2 * x * self.weight


class GatedRMSNorm(_Norm):
    def forward(self, x, gate):
        return x * gate


class FussyRMSNorm(_Norm):
    def forward(self, x):
        raise RuntimeError("only on Sundays")


class OutsideRMSNorm(MixtralRMSNorm):
    """eps beside the root, not under it."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


@pytest.mark.parametrize(
    "norm", [TwiceRMSNorm(), GatedRMSNorm(), FussyRMSNorm(), OutsideRMSNorm(64), nn.Identity()]
)
@pytest.mark.parametrize("dtype", BOTH)
@torch.inference_mode()
def test_what_answers_otherwise_or_not_at_all_is_left_alone(norm, dtype):
    assert lean_norm(copy(norm).to(dtype), library(), dtype) is None


class ScaledRMSNorm(MixtralRMSNorm):
    def forward(self, x, by=1):
        return super().forward(x) * by


@torch.inference_mode()
def test_further_arguments_are_for_the_stock_code():
    norm, x = ScaledRMSNorm(96).to(torch.bfloat16), numbers(4, 96)
    assert bound(norm, torch.bfloat16) is not None
    assert norm(x, by=3).equal(ScaledRMSNorm.forward(norm, x, 3))
