"""Packed weights: the layout against its words, nothing lost by packing, bad ones refused."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.kernels.packed import PackedWeight, dequantize, empty_packed, pack, unpack

KINDS = (None, torch.uint8, torch.float16)


def random_levels(shape, bits, group_size, kind, seed=0):
    """Levels of every value, scales of both signs, and zeros of the kind."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 16:
        return torch.randn(shape, generator=generator).bfloat16(), None, None
    groups = (*shape[:-1], shape[-1] // group_size)
    q = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randn(groups, generator=generator).half()
    if kind is None:
        return q, scales, None
    if kind == torch.uint8:
        points = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
        return q, scales, points
    return q, scales, torch.randn(groups, generator=generator).half()


@st.composite
def formats(draw):
    """(shape, bits, group_size, kind of zeros)"""
    bits = draw(st.sampled_from([4, 8, 16]))
    group = draw(st.sampled_from([32, 64, 128])) if bits < 16 else 0
    width = group * draw(st.integers(1, 3)) if group else draw(st.integers(1, 70))
    stack = draw(st.sampled_from([(), (1,), (3,)]))
    kind = draw(st.sampled_from(KINDS)) if bits < 16 else None
    return (*stack, draw(st.integers(1, 50)), width), bits, group, kind


def same(a, b):
    return a is b if a is None or b is None else torch.equal(a, b)


@given(formats(), st.integers(0, 100))
def test_unpack_gives_back_what_was_packed(form, seed):
    levels = random_levels(*form, seed)
    packed = pack(*levels, *form[1:3])
    assert all(same(a, b) for a, b in zip(unpack(packed), levels, strict=True))
    assert packed.shape == form[0]


def slow_dequantize(q, scales, zeros, bits, group_size):
    """The format's definition, over levels in their logical order."""
    if bits == 16:
        return q.float()
    scales = scales.float().repeat_interleave(group_size, dim=-1)
    if zeros is None:
        return scales * (q.float() - 2 ** (bits - 1))
    spread = zeros.float().repeat_interleave(group_size, dim=-1)
    return scales * (q.float() - spread) if zeros.dtype == torch.uint8 else scales * q + spread


@given(formats(), st.integers(0, 100))
def test_dequantize_follows_the_definition_to_the_last_bit(form, seed):
    levels = random_levels(*form, seed)
    packed, expected = pack(*levels, *form[1:3]), slow_dequantize(*levels, *form[1:3])
    assert torch.equal(dequantize(packed), expected)
    assert torch.equal(dequantize(packed, torch.bfloat16), expected.bfloat16())
    if len(form[0]) == 3:
        assert torch.equal(dequantize(packed, expert=form[0][0] - 1), expected[-1])


@given(formats())
def test_size_is_exact_and_padded_rows_weigh_nothing(form):
    shape, bits, group, kind = form
    packed = pack(*random_levels(*form), bits, group)
    experts, rows = (shape[0] if len(shape) == 3 else 1), -(-shape[-2] // 16) * 16
    row = -(-shape[-1] // 2) * 4 if bits == 16 else shape[-1] * bits // 8
    if group:
        row += shape[-1] // group * (2 + {None: 0, torch.uint8: 1, torch.float16: 2}[kind])
    assert packed.nbytes == experts * rows * row
    whole = replace(packed, shape=(experts, rows, shape[-1]))
    assert (dequantize(whole)[:, shape[-2] :] == 0).all()


def test_where_the_kernels_find_each_level():
    shape = (2, 33, 64)
    q, scales, zeros = random_levels(shape, 4, 32, torch.uint8)
    packed = pack(q, scales, zeros, 4, 32)
    assert packed.data.shape == (2, 3, 8, 16, 4)
    wide = pack(q, scales, zeros, 8, 32)
    assert wide.data.shape == (2, 3, 16, 16, 4)
    halves = pack(q.bfloat16(), None, None, 16, 0)
    assert halves.data.shape == (2, 3, 32, 16, 2)
    for e, row, k in [(0, 0, 0), (1, 15, 63), (1, 16, 5), (0, 32, 12), (1, 20, 39)]:
        level, place = int(q[e, row, k]), (e, row // 16)
        byte = int(packed.data[(*place, k // 8, row % 16, k % 4)])
        assert (byte & 15 if k % 8 < 4 else byte >> 4) == level
        assert wide.data[(*place, k // 4, row % 16, k % 4)] == level
        assert halves.data[(*place, k // 2, row % 16, k % 2)] == level
        group = (*place, k // 32, row % 16)
        assert packed.scales[group] == scales[e, row, k // 32]
        assert packed.zeros[group] == zeros[e, row, k // 32]


def packed_example(kind=torch.uint8):
    return pack(*random_levels((2, 20, 64), 4, 32, kind), 4, 32)


def test_a_copy_has_tensors_of_its_own_and_nothing_else():
    packed = packed_example()
    object.__setattr__(packed, "address", 1)  # what a kernel may keep
    twin = copy.deepcopy(packed)
    assert not hasattr(twin, "address")
    for field in fields(PackedWeight):
        one, other = getattr(packed, field.name), getattr(twin, field.name)
        if torch.is_tensor(one):
            assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
        else:
            assert one == other


CORRUPTED = {
    "short data": lambda w: {"data": w.data[:, :-1].contiguous()},
    "data of another type": lambda w: {"data": w.data.to(torch.int8)},
    "data with gaps": lambda w: {"data": torch.cat([w.data, w.data], -1)[..., ::2]},
    "no scales": lambda w: {"scales": None},
    "few scales": lambda w: {"scales": w.scales[:1]},
    "scales in float32": lambda w: {"scales": w.scales.float()},
    "few zeros": lambda w: {"zeros": w.zeros[:, :1].contiguous()},
    "zeros in float32": lambda w: {"zeros": w.zeros.float()},
    "another shape": lambda w: {"shape": (2, 33, 64)},
    "other bits": lambda w: {"bits": 8},
    "scales at 16 bits": lambda w: {"bits": 16, "group_size": 0, "data": halves(w)},
    "on another device": lambda w: {"data": w.data.to("meta")},
}


def halves(packed):
    return torch.zeros(2, 2, 32, 16, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize("how", CORRUPTED)
def test_a_corrupted_one_is_refused_when_made(how):
    packed = packed_example()
    with pytest.raises(ExpertlyError, match=r"^error\[E301\] a packed weight's \w+: ") as refusal:
        replace(packed, **CORRUPTED[how](packed))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "said"),
    [
        ((4, 48), 4, 32, "an input width of 48 does not divide into groups of 32"),
        ((4, 64), 4, 48, "groups have 32, 64 or 128 weights, not 48"),
        ((4, 64), 3, 32, "4, 8 or 16 bits, not 3"),
        ((4, 64), 2, 32, "4, 8 or 16 bits, not 2"),
        ((4, 64), 16, 32, "16 bits have no groups"),
        ((64,), 4, 32, r"not \(64,\)"),
        ((0, 64), 4, 32, r"not \(0, 64\)"),
    ],
)
def test_settings_that_no_kernel_runs_are_refused(shape, bits, group_size, said):
    with pytest.raises(ExpertlyError, match=said) as refusal:
        empty_packed(shape, bits, group_size)
    assert refusal.value.code == "E202" and "\n" not in str(refusal.value)


def test_levels_that_do_not_fit_are_refused():
    q, scales, zeros = random_levels((4, 32), 4, 32, torch.uint8)
    for bad, said in (
        ((q + 1, scales, zeros), "16 does not fit into 4 bits"),
        ((q.short(), scales, zeros), "expected"),
        ((q, scales[:1], zeros), "expected"),
        ((q, scales, zeros.float()), "expected"),
        ((q, None, zeros), "missing"),
        ((q, scales.clone().fill_(torch.nan), zeros), "4 are not finite numbers"),
        ((q, scales, scales / 0), "4 are not finite numbers"),
    ):
        with pytest.raises(ExpertlyError, match=said):
            pack(*bad, 4, 32)
