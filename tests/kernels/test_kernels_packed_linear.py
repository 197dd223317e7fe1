"""Packed linears against torch's on the dequantised weights, forward and backward."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # which teaches the pickler below about tensors
import torch.nn.functional as F
from packed_errors import error, tolerance

from expertly.errors import ExpertlyError
from expertly.kernels import packed_linear as module
from expertly.kernels.packed import dequantize
from expertly.kernels.packed_linear import (
    PackedLinear,
    grouped_packed_linear,
    packed_linear,
    packed_linears,
)
from expertly.kernels.quantize import quantize

BITS = (4, 8, 16)
each_bits = pytest.mark.parametrize("bits", BITS)


def packed_matrix(bits, out=40, width=96, **form):
    torch.manual_seed(0)
    return quantize(torch.randn(out, width) / 8, bits, 32, **form)


@each_bits
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (70,), (2, 3), ()])
def test_equal_to_a_linear_of_the_dequantized_weight(path, bits, biased, shape):
    weight = packed_matrix(bits)
    bias = torch.randn(40) if biased else None
    x = torch.randn(*shape, 96)
    out = PackedLinear(weight, bias)(x)
    exact = F.linear(x, dequantize(weight), bias)
    assert out.shape == exact.shape and out.dtype == torch.float32
    assert error(out, exact) < tolerance(path, bits)


@pytest.mark.parametrize("form", [{"symmetric": False}, {"symmetric": False, "minimum": True}])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_and_minima(path, bits, form):
    weight = packed_matrix(bits, **form)
    x = torch.randn(5, 96) + 0.3
    assert error(packed_linear(x, weight), x @ dequantize(weight).T) < tolerance(path, bits)


@each_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_went(path, bits, dtype):
    weight, x = packed_matrix(bits), torch.randn(6, 96).to(dtype)
    out = packed_linear(x, weight)
    assert out.dtype == dtype
    exact = x.double() @ dequantize(weight).double().T
    assert error(out, exact) < tolerance(path, bits) + torch.finfo(dtype).eps


def test_an_odd_width_at_16_bits(path):
    weight, x = packed_matrix(16, out=5, width=33), torch.randn(4, 33)
    assert error(packed_linear(x, weight), x @ dequantize(weight).T) < 1e-5


@each_bits
def test_several_linears_of_one_input_are_each_its_own(path, bits):
    weights = [packed_matrix(bits, out) for out in (16, 40, 3)]
    biases = [None, torch.randn(40), torch.randn(3)]
    x = torch.randn(2, 5, 96)
    together = packed_linears(x, weights, biases)
    for out, weight, bias in zip(together, weights, biases, strict=True):
        assert torch.equal(out, packed_linear(x, weight, bias))


@each_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_linear(path, bits, dtype):
    weights = [packed_matrix(bits, out) for out in (40, 24)]
    biases = [torch.randn(40, requires_grad=True), None]
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    outs = packed_linears(x, weights, biases)
    grads = [torch.randn_like(out) for out in outs]
    exact = [
        F.linear(x.float(), dequantize(weight), bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    theirs = torch.autograd.grad(exact, [x, biases[0]], [grad.float() for grad in grads])
    ours = torch.autograd.grad(outs, [x, biases[0]], grads)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and error(a, b) < 1e-5 + (dtype == torch.bfloat16) * 1e-2


@each_bits
def test_no_token_at_all(path, bits):
    layer, x = PackedLinear(packed_matrix(bits), torch.randn(40)), torch.zeros(0, 3, 96)
    assert layer(x).shape == (0, 3, 40)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    assert grad.shape == x.shape


def test_an_input_of_another_width_is_refused(path):
    with pytest.raises((ValueError, RuntimeError)):
        packed_linear(torch.randn(2, 64), packed_matrix(4))


def test_gradcheck_in_double_precision():
    weight = packed_matrix(4, out=5, width=32)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packed_linear(x, weight), x)
    with torch.no_grad():
        expected = torch.ones(3, 5, dtype=torch.float64).sum(0)
    (grad,) = torch.autograd.grad(packed_linear(x.detach(), weight, bias).sum(), bias)
    torch.testing.assert_close(grad, expected)


def test_a_bias_asks_for_no_gradient_until_someone_wants_it():
    layer = PackedLinear(packed_matrix(4), torch.randn(40))
    assert not layer(torch.randn(2, 96)).requires_grad
    layer.bias.requires_grad_()
    layer(torch.randn(2, 96)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 2.0))


@each_bits
def test_autocast_gives_its_dtype(path, bits):
    layer, x = PackedLinear(packed_matrix(bits)), torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert error(out, layer(x.bfloat16())) < 1e-6


def test_autocast_leaves_float64_alone(path):
    layer, x = PackedLinear(packed_matrix(4)), torch.randn(3, 96).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, torch.eye(96).double()).dtype == module.compute_dtype(x) == torch.double
        assert torch.equal(layer(x), layer(x.clone()))
        out = layer(x)
    assert out.dtype == torch.float64 and torch.equal(out, layer(x))


def test_shared_memory_holds_all_of_it(path):
    model = torch.nn.Sequential(PackedLinear(packed_matrix(4, symmetric=False), torch.randn(40)))
    x = torch.randn(3, 96)
    out = model(x)
    assert not any(each.is_shared() for each in model.state_dict().values())
    model.share_memory()
    assert all(each.is_shared() for each in model.state_dict().values())
    assert model[0].weight.data is model[0].weight_data and model[0].weight.zeros.is_shared()
    assert torch.equal(model(x), out)


def test_what_another_process_is_sent_still_answers(path):
    """Pickling for torch.multiprocessing moves the sender's tensors."""
    layer, x = PackedLinear(packed_matrix(4), torch.randn(40)), torch.randn(3, 96)
    out = layer(x)
    sent = ForkingPickler.dumps(layer)
    assert layer.weight.data.is_shared()
    assert torch.equal(layer(x), out)
    assert torch.equal(pickle.loads(sent)(x), out)


def test_the_default_device_does_not_matter(path):
    layer, x = PackedLinear(packed_matrix(4)), torch.randn(3, 96)
    out = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), out) and dequantize(layer.weight).is_cpu
        layer.bfloat16()


def test_casting_copying_and_saving_leave_the_bits():
    layer = PackedLinear(packed_matrix(4), torch.randn(40))
    x = torch.randn(3, 96)
    out = layer(x)
    other = PackedLinear(quantize(torch.zeros(40, 96), 4), torch.zeros(40))
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), other, layer.bfloat16(), layer.double(), layer.to("cpu")):
        assert torch.equal(twin(x), out)
    assert layer.weight.scales is layer.weight_scales and layer.weight.scales.dtype == torch.half
    with pytest.raises(ExpertlyError, match="packed weights run on the CPU"):
        layer.to("meta")


def test_it_says_what_it_is():
    said = repr(PackedLinear(packed_matrix(4)))
    assert said == "PackedLinear(in_features=96, out_features=40, bits=4, group_size=32)"


@each_bits
def test_grouped_linear_is_one_linear_per_expert(path, bits):
    torch.manual_seed(0)
    weight = quantize(torch.randn(5, 24, 64) / 8, bits, 32)
    bias, counts = torch.randn(5, 24), torch.tensor([0, 4, 1, 40, 0])
    x = torch.randn(45, 64, requires_grad=True)
    groups = zip(x.split(counts.tolist()), dequantize(weight), bias, strict=True)
    exact = torch.cat([F.linear(*group) for group in groups])
    out = grouped_packed_linear(x, weight, bias, counts)
    assert error(out, exact) < tolerance(path, bits)
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(result, x, grad)[0] for result in (out, exact))
    assert error(ours, theirs) < 1e-5
    with torch.no_grad():
        assert torch.equal(grouped_packed_linear(x, weight, bias, counts), out)


def test_large_matrices_are_never_dequantized_as_a_whole(monkeypatch):
    monkeypatch.setattr(module, "library", lambda: None)
    weight, largest, real = packed_matrix(4, 4096, 1024), [0], module.dequantize_rows

    def spy(packed, expert, rows):
        out = real(packed, expert, rows)
        largest[0] = max(largest[0], out.numel())
        return out

    monkeypatch.setattr(module, "dequantize_rows", spy)
    packed_linear(torch.randn(1, 1024), weight)
    assert 0 < largest[0] <= 1 << 18
