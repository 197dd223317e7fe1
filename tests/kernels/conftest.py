"""Both ways that packed weights are computed."""

import pytest
import torch

from expertly.kernels import packed_linear


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Run on the native kernels, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(packed_linear, "library", lambda: None)
    elif packed_linear.native_for(torch.ones(1)) is None:
        pytest.skip("no native kernels here")
    return request.param
