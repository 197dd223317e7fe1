"""RMSNorm in one native call: how it rounds, and what it refuses."""

import pytest
import torch
from test_kernels_native_abi import broken

from expertly.kernels import native_abi as abi
from expertly.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not compiled")


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 16, 50])
def test_rms_norm_rounds_as_transformers_does(kernels, x_type, w_type, dim):
    x, weight = torch.randn(3, 5, dim).to(x_type), torch.randn(dim).to(w_type)
    scale = (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    llama = weight * (x.float() * scale).to(x_type)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), llama, rtol=8e-3, atol=1e-6)
    gemma = (x.float() * scale * (1 + weight.float())).to(x_type)
    found = kernels.rms_norm(x, weight, 1e-6, 1.0, once=True)
    torch.testing.assert_close(found, gemma, rtol=8e-3, atol=1e-6)
    if x_type == torch.bfloat16 and dim == 50:
        assert (kernels.rms_norm(x, weight, 1e-6) == llama).float().mean() > 0.95
        assert (found == gemma).float().mean() > 0.95


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        broken(0),
        broken(-1, x=0),
        broken(-1, weight=0),
        broken(-1, y=0),
        broken(-8, rows=-1),
        broken(-8, dim=0),
        broken(-8, dim=-64),
        broken(-9, rows=1 << 60),
        broken(-10, x_type=2),
        broken(-10, w_type=-1),
        broken(-10, y_type=7),
        broken(-15, x=2),
        broken(-15, y=1),
    ],
)
def test_a_broken_norm_is_refused(fields, code):
    x, weight, y = torch.zeros(2, 64), torch.zeros(64), torch.zeros(2, 64)
    places = {"x": x.data_ptr(), "weight": weight.data_ptr(), "y": y.data_ptr()}
    good = {**places, "rows": 2, "dim": 64, "x_type": 0, "w_type": 0, "y_type": 0, "once": 0}
    call = abi.norm(*{**good, **fields}.values(), 1e-6, 0.0)
    assert library()._norm(library().isa, call) == code
    assert library()._norm(library().isa, None) == -1
    assert library()._norm(library().isa + 1, call) == library()._norm(-1, call) == -2
