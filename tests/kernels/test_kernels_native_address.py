"""Where the kernels find a weight's tensors, and leave their answers."""

import copy

import pytest
import torch

from expertly.kernels import native
from expertly.kernels.native import Gate, library
from expertly.kernels.quantize import quantize

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not compiled")


def random_packed(*shape):
    return quantize(torch.randn(shape), 4, 32, symmetric=False)


def test_two_threads_agree_on_one_struct(monkeypatch):
    weight, others, made = random_packed(16, 64), [], native._native_of

    def overtaken(weight):
        monkeypatch.setattr(native, "_native_of", made)
        others.append(native.address_of(weight))  # another thread's, in between
        return made(weight)

    monkeypatch.setattr(native, "_native_of", overtaken)
    assert [native.address_of(weight)] == others == [native.address_of(weight)]


@pytest.mark.parametrize("part", ["data", "scales", "zeros"])
def test_a_weight_that_has_moved_is_read_where_it_is(part):
    weight, x = random_packed(16, 64), torch.randn(2, 64)
    [before], address = library().linears([weight], [None], x), native.address_of(weight)
    tensor = getattr(weight, part)
    old, place = tensor.untyped_storage(), tensor.data_ptr()
    kept = torch.tensor([], dtype=tensor.dtype).set_(old.clone(), 0, tensor.shape)
    tensor.share_memory_()
    assert tensor.data_ptr() != place and torch.equal(kept, tensor)
    assert torch.equal(library().linears([weight], [None], x)[0], before)
    assert native.address_of(weight) == address, "others hold the struct"
    struct = native.abi.Weight.from_address(address)
    assert getattr(struct, part) == tensor.data_ptr()


def test_answers_are_on_the_cpu_whatever_the_default_device():
    weight, x = random_packed(2, 64, 64), torch.randn(3, 64)
    one, counts = random_packed(64, 64), torch.tensor([1, 2])
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with torch.device("meta"):
        found = [
            *library().linears([one], [None], x),
            library().grouped_linear(weight, None, x, counts),
            library().experts(weight, weight, None, None, Gate("relu", False), x, ids, weights),
            library().rms_norm(x, x[0], 1e-6),
        ]
    assert all(each.is_cpu and each.isfinite().all() for each in found)


def test_a_copied_weight_has_its_own_address():
    weight = random_packed(16, 64)
    address = native.address_of(weight)
    assert native.address_of(weight) == address
    assert native.address_of(copy.deepcopy(weight)) != address
