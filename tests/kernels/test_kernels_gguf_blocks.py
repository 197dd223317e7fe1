"""GGUF's blocks are repacked without changing one bit of a weight."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.kernels.gguf_blocks import from_gguf
from expertly.kernels.packed import dequantize

KINDS = ("Q4_0", "Q4_1", "Q8_0")


def theirs(blocks, kind):
    """The weights as the gguf package reads them."""
    return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[kind]))


@given(
    st.sampled_from(KINDS),
    st.sampled_from([(), (1,), (3,)]),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_weights_are_equal_to_the_bit(kind, stack, rows, groups, seed):
    weight = np.random.default_rng(seed).normal(size=(*stack, rows, groups * 32))
    blocks = quants.quantize(weight.astype(np.float32), GGMLQuantizationType[kind])
    packed = from_gguf(torch.from_numpy(blocks), kind)
    assert packed.shape == weight.shape
    assert torch.equal(dequantize(packed), theirs(blocks, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_random_bytes_too(kind):
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (300, 7, size), dtype=np.uint8)
    blocks[..., [1, 3] if kind == "Q4_1" else [1]] &= 0xBF  # no infinite or missing scales
    blocks = blocks.reshape(300, -1)
    ours = dequantize(from_gguf(torch.from_numpy(blocks), kind))
    assert torch.equal(ours, theirs(blocks, kind))


def test_other_kinds_and_broken_rows_are_refused():
    blocks = torch.zeros(4, 36, dtype=torch.uint8)
    for bad, kind, said in (
        (blocks, "Q6_K", "Q6_K is not one of Q4_0, Q4_1, Q8_0"),
        (blocks, "Q4_1", r"\(4, 36\) torch.uint8 is not rows of whole Q4_1 blocks"),
        (blocks.float(), "Q4_0", "not rows of whole Q4_0 blocks"),
        (blocks[0], "Q4_0", "not rows of whole Q4_0 blocks"),
    ):
        with pytest.raises(ExpertlyError, match=said) as refusal:
            from_gguf(bad, kind)
        assert refusal.value.code == "E301"
