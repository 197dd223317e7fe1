"""Packed matrices as rows of bytes, and zero points as the format stores them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_models import parts

from expertly.errors import ExpertlyError
from expertly.kernels.quantize import quantize
from expertly.models.packed_files import pack_zeros, unpack_zeros
from expertly.models.records import pack_record, record_of


@given(
    st.sampled_from((4, 8)),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from((32, 64, 128)),
    st.booleans(),
    st.integers(0, 3),
)
def test_records_bring_back_every_bit(bits, out, groups, group_size, symmetric, experts):
    torch.manual_seed(out)
    shape = (*[experts] * bool(experts), out, groups * group_size)
    weight = quantize(torch.randn(shape), bits, group_size, symmetric=symmetric)
    again = pack_record(record_of(weight), "a weight")
    assert again.shape == weight.shape and again.data.equal(weight.data)
    assert all(a.equal(b) for a, b in zip(parts(again), parts(weight), strict=True))


def test_a_conversion_that_moves_anything_but_rows_is_noticed():
    record = record_of(quantize(torch.randn(64, 64), 4))
    pack_record(record.flip(0), "rows may move")
    for moved in (record.T, record.roll(1, 1), record.view(128, -1), record[:, :4]):
        with pytest.raises(ExpertlyError) as error:
            pack_record(moved.contiguous(), "x.weight")
        assert error.value.code == "E306" and "x.weight" in str(error.value)


@given(st.sampled_from((4, 8)), st.integers(1, 40), st.integers(1, 5))
def test_zero_points_are_packed_as_the_formats_owner_packs_them(bits, out, groups):
    points = torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8)
    packed = pack_zeros(points, bits)
    assert unpack_zeros(packed, out, bits).equal(points)
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = (points.int() - 2 ** (bits - 1)).to(torch.int8)
    assert helpers.pack_to_int32(signed, bits, packed_dim=0).equal(packed)
