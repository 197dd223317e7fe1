"""Both ways that packed weights are computed, every instruction set, and sanitized programs."""

import pytest
import torch
from sanitized import Sanitized

from expertly.kernels import packed_linear
from expertly.kernels.native import ISAS, Library, library
from expertly.kernels.native_ops import Operations


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Run on the native kernels, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(packed_linear, "library", lambda: None)
    elif packed_linear.native_for(torch.ones(1)) is None:
        pytest.skip("no native kernels here")
    return request.param


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def kernels(request):
    loaded = library()
    if loaded is None or request.param > loaded.isa:
        pytest.skip("this machine lacks the instruction set")
    return Library(loaded.handle, request.param)


@pytest.fixture
def native(kernels):
    """What stands around the packed linears, for each instruction set."""
    return Operations(kernels.handle, kernels.isa)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """sanitized.program(sources) -> a program under sanitizers."""
    return Sanitized(tmp_path_factory.mktemp("sanitized"))
