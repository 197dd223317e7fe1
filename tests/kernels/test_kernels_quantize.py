"""Rounding to nearest: within half a step of the weight, small in memory, bad weights refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import expertly.kernels.quantize as quantize_module
from expertly.errors import ExpertlyError
from expertly.kernels.packed import dequantize, unpack
from expertly.kernels.quantize import quantize, quantize_rows

FORMS = {
    "symmetric": {},
    "zero points": {"symmetric": False},
    "minima": {"symmetric": False, "minimum": True},
}
each_form = pytest.mark.parametrize("form", FORMS)
both_bits = pytest.mark.parametrize("bits", [4, 8])


def random_weight(*shape, seed=0, size=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return size * (torch.randn(shape, generator=generator) + shift)


def steps(packed):
    """Each weight's step: the absolute scale of its group, in the weight's shape."""
    return unpack(packed).scales.float().abs().repeat_interleave(packed.group_size, dim=-1)


@given(
    st.sampled_from([4, 8]),
    st.sampled_from(list(FORMS)),
    st.sampled_from([32, 64, 128]),
    st.floats(-8, 3).map(lambda power: 10**power),
    st.floats(-3, 3),
    st.integers(0, 1000),
)
def test_error_is_half_a_step_at_most(bits, form, group_size, size, shift, seed):
    weight = random_weight(5, 256, seed=seed, size=size, shift=shift)
    packed = quantize(weight, bits, group_size, **FORMS[form])
    error, step = (dequantize(packed) - weight).abs(), steps(packed)
    # scales and minima are rounded to float16, which moves the last level a little
    slack = step * (0.5 + 2**bits * 2**-11) + weight.abs().amax() * 2**-11 * (form == "minima")
    slack += 2**-25 * (form == "minima")  # below float16's normal numbers
    cut = torch.zeros_like(error)
    if form == "symmetric" and bits == 4:  # one side has 7 steps; the other's extreme has 8
        cut = step * (weight.abs() > 7.5 * step)
    assert (error <= slack + cut + 2**-20 * size).all()


@each_form
@both_bits
@pytest.mark.parametrize("size", [1e-5, 1e-6, 2e-7])
def test_tiny_groups_are_not_lost(bits, form, size):
    """float16 scales are multiples of 6e-8: levels are used as far as they go."""
    weight = size * random_weight(8, 64).clamp(-1, 1)
    packed = quantize(weight, bits, 32, **FORMS[form])
    assert (unpack(packed).scales.abs() >= 2**-24).all()
    step = size / (8 if bits == 4 else 200)  # about; at 4 bits one end may be a whole one off
    assert (dequantize(packed) - weight).abs().max() <= step + 2**-24
    assert dequantize(packed).any()


@each_form
@both_bits
def test_every_level_is_used_at_the_ends_of_the_range(bits, form):
    weight = random_weight(64, 512, shift=0.5)
    q = unpack(quantize(weight, bits, 32, **FORMS[form])).q
    low = 1 if (form, bits) == ("symmetric", 8) else 0  # 8 bits: 127 steps on either side
    assert int(q.min()) == low
    assert int(q.max()) == (1 << bits) - 1


@both_bits
def test_errors_of_gaussian_weights(bits):
    weight = random_weight(64, 1024)
    errors = {
        form: float((dequantize(quantize(weight, bits, **FORMS[form])) - weight).norm())
        / float(weight.norm())
        for form in FORMS
    }
    limits = (0.08, 0.09) if bits == 4 else (0.004, 0.006)
    assert all(limits[0] * 0.8 < error < limits[1] for error in errors.values()), errors


@each_form
@both_bits
def test_search_never_makes_a_group_worse(bits, form):
    weight = random_weight(16, 512) ** 3
    plain, searched = (
        (dequantize(quantize(weight, bits, search=search, **FORMS[form])) - weight)
        .square()
        .view(16, -1, 32)
        .sum(-1)
        for search in (False, True)
    )
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() <= (0.99 if bits == 4 else 1.0) * plain.sum()


@each_form
@both_bits
def test_constant_groups_and_zeros_are_exact_enough(bits, form):
    weight = torch.tensor([0.0, 1.5, -1.5]).repeat_interleave(32).expand(3, -1)
    back = dequantize(quantize(weight, bits, 32, **FORMS[form]))
    torch.testing.assert_close(back, weight, atol=0, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_strides_and_stacks_do_not_matter(dtype):
    weight = random_weight(3, 40, 64).to(dtype)
    stack = quantize(weight, 4, 32)
    turned = quantize(weight.mT.contiguous().mT, 4, 32)
    assert torch.equal(stack.data, turned.data)
    for expert in range(3):
        one = quantize(weight[expert], 4, 32)
        assert torch.equal(one.data[0], stack.data[expert])
        assert torch.equal(one.scales[0], stack.scales[expert])


def test_16_bits_are_the_rounded_weights():
    weight = random_weight(2, 20, 33)
    assert torch.equal(dequantize(quantize(weight, 16), torch.bfloat16), weight.bfloat16())


def test_a_stack_is_never_copied_as_a_whole(monkeypatch):
    weight, largest = random_weight(8, 1024, 512).bfloat16(), [0]

    def spy(tensor, *args):
        largest[0] = max(largest[0], tensor.numel())
        return real(tensor, *args)

    real = quantize_module._rounded
    monkeypatch.setattr(quantize_module, "_rounded", spy)
    quantize(weight, 4)
    assert largest[0] <= 1 << 18


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_a_number_is_refused_with_the_count(bits, bad):
    weight = random_weight(2, 600, 512)
    weight[1, 17, 3], weight[1, 599, 511] = bad, bad
    said = r"error\[E301\] layers.3.up: 2 of 307200 values are not finite numbers"
    with pytest.raises(ExpertlyError, match=said):
        quantize(weight, bits, name="layers.3.up")


@pytest.mark.parametrize("form", FORMS)
def test_what_float16_scales_cannot_say_is_refused(form):
    with pytest.raises(ExpertlyError, match="too large"):
        quantize(random_weight(4, 64, size=1e8), 4, **FORMS[form])
    with pytest.raises(ExpertlyError, match="too large"):
        quantize(torch.full((4, 64), torch.finfo(torch.float32).max), 16)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_numbers_that_only_float64_holds_are_too_large(bits):
    with pytest.raises(ExpertlyError, match=r"E301\] up: .*too large"):
        quantize(torch.full((16, 64), 1e300, dtype=torch.float64), bits, name="up")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_that_are_quantised_already_are_refused(bits, dtype):
    said = rf"E202\] layers.3.up: {str(dtype)[6:]} numbers .* FIX: convert the model"
    with pytest.raises(ExpertlyError, match=said):
        quantize(torch.ones(16, 64).to(dtype), bits, name="layers.3.up")


def test_a_row_written_in_place_leaves_the_others():
    weight = random_weight(64, 64)
    packed = quantize(weight, 4)
    before = dequantize(packed)
    quantize_rows(packed, weight[16:32] * 2, start=16)
    after = dequantize(packed)
    torch.testing.assert_close(after[16:32], before[16:32] * 2)
    keep = [*range(16), *range(32, 64)]
    assert torch.equal(after[keep], before[keep])
