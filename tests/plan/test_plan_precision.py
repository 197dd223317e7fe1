"""Formats by part and bytes of weights: EAC-MoE's memory table, what --bits says, what is read."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import LAYER, MOE, TINY

from expertly.errors import ExpertlyError
from expertly.plan.known import shape_of
from expertly.plan.precision import (
    FORMATS,
    QUANTISABLE,
    format_of,
    name_of,
    precision,
    weight_bytes,
    weights,
)
from expertly.plan.shape import PARTS, FeedForward, total


def resident(shape, formats):
    return sum(each.resident for each in weights(shape, formats).values())


# EAC-MoE (ACL 2025 long.633), Table 4: GB in fp16, and at 3.03 bits
TABLE = [
    ("mixtral-8x7b", 93.41, 18.98),
    ("phi-3.5-moe", 83.75, 17.08),
    ("deepseek-moe-16b", 32.75, 7.19),
    ("qwen1.5-moe-a2.7b", 28.63, 6.69),
]


@pytest.mark.parametrize(("name", "half", "low"), TABLE)
def test_the_memory_table_of_eac_moe(name, half, low):
    shape = shape_of(name)
    assert resident(shape, precision(shape, "fp16")) / 1e9 == pytest.approx(half, rel=0.002)
    mixed = precision(shape, "fp16", "3,attention=4")
    assert resident(shape, mixed) / 1e9 == pytest.approx(low, rel=0.002)


def test_average_bits_of_eac_moe_are_3_03():
    shape, formats = shape_of("mixtral-8x7b"), precision(TINY, "fp16", "3,attention=4")
    experts, attention = (
        weights(shape, precision(shape, "fp16"))[part].resident for part in ("experts", "attention")
    )
    bits = experts * formats["experts"].bits + attention * formats["attention"].bits
    assert bits / (experts + attention) == pytest.approx(3.029, abs=0.0005)


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("fp32", 128, 512),
        ("fp16", 128, 256),
        ("bf16", 128, 256),
        ("fp8", 128 * 128, 128 * 128 + 4),
        ("mxfp4", 32, 17),
        ("int8", 128, 128 + 3),
        ("int4", 128, 64 + 2.5),
        ("int3", 128, 48 + 19 / 8),
        ("int2", 128, 32 + 18 / 8),
    ],
)
def test_bytes_of_one_block_of_each_format(name, count, size):
    assert weight_bytes(count, FORMATS[name]) == pytest.approx(size)


@pytest.mark.parametrize(
    ("dtype", "bits", "name"),
    [
        (None, None, "bf16"),
        ("float32", None, "fp32"),
        ("FP8", None, "fp8"),
        (None, "4", "int4"),
        (None, "8", "int8"),
        (None, "2.5", "int2.5"),
        (None, "4g32", "int4g32"),
        (None, "4g128", "int4"),
        (None, "16", "bf16"),
        ("fp16", "3,attention=4", "int3 (attention int4)"),
        (None, "4, shared_experts = 8", "int4 (shared experts int8)"),
        (None, "4,attention=16,dense-layers=16", "int4 (dense layers, attention bf16)"),
        (None, "experts=4", "int4 (shared experts, dense layers, attention bf16)"),
    ],
)
def test_what_the_flags_say(dtype, bits, name):
    assert name_of(precision(TINY, dtype, bits)) == name


def test_bits_never_touch_embeddings_head_router_and_norms():
    formats = precision(TINY, "fp32", "2,attention=3")
    for part in set(PARTS) - set(QUANTISABLE):
        assert formats[part] == FORMATS["fp32"]


def test_a_mix_of_two_widths_costs_what_its_halves_do():
    half, low, high = (precision(TINY, None, bits)["experts"] for bits in ("2.5", "2", "3"))
    both = weight_bytes(500, low) + weight_bytes(500, high)
    assert weight_bytes(1000, half) == pytest.approx(both)


def test_the_name_leaves_out_parts_that_a_model_does_not_have():
    formats = precision(TINY, None, "experts=4")
    assert name_of(formats, TINY) == "int4 (attention bf16)"
    dense = replace(TINY, layers=(replace(LAYER, feed_forward=FeedForward(dense=9, width=3)),))
    assert name_of(formats, dense) == "bf16"


def test_a_checkpoints_own_formats_hold_unless_a_dtype_is_said():
    stored = replace(TINY, stored={"attention": "fp16", "experts": "mxfp4"})
    formats = precision(stored)
    assert formats["head"].name == "bf16"
    assert (formats["experts"].name, formats["attention"].name) == ("mxfp4", "fp16")
    assert name_of(precision(stored, "bf16")) == "bf16"
    assert precision(stored, None, "attention=4")["experts"].name == "mxfp4"


@pytest.mark.parametrize("name", ["int4g32", "INT4g32", "int5", "int4.65", "int4g128"])
def test_a_stored_format_of_any_bits_and_group_is_the_one_of_the_flag(name):
    own = precision(replace(TINY, stored=dict.fromkeys(QUANTISABLE, name)))
    assert own == precision(TINY, None, name.lower().removeprefix("int"))


@pytest.mark.parametrize("name", ["int", "int0", "int17", "int4g0", "4", "4g32", "int4g", ""])
def test_no_format_has_such_a_name(name):
    assert format_of(name) is None


@pytest.mark.parametrize(
    ("dtype", "bits", "said"),
    [
        ("int17", None, "--dtype: 'int17' is no format"),
        ("bf17", None, "'bf17' is no format. FIX: write bf16"),
        ("?", None, "choose one of bf16"),
        ("", None, "'' is no format"),
        (None, "", "'' is not BITS"),
        (None, "0.5", "'0.5' is not BITS"),
        (None, "17", "'17' is not BITS"),
        (None, "-4", "'-4' is not BITS"),
        (None, "nan", "'nan' is not BITS"),
        (None, "9" * 5000, "is not BITS"),
        (None, "4g0", "GROUP 1 to 65536"),
        (None, "4g65537", "GROUP 1 to 65536"),
        (None, "4,5", "'5' is not PART=BITS"),
        (None, "router=4", "'router=4' is not PART=BITS, PART one of experts, shared experts"),
        (None, "4,head=4", "'head=4' is not PART=BITS"),
        (None, "attention=", "'' is not BITS"),
    ],
)
def test_e208_for_what_is_no_format(dtype, bits, said):
    with pytest.raises(ExpertlyError) as caught:
        precision(TINY, dtype, bits)
    assert caught.value.code == "E208"
    assert said in str(caught.value)


def test_one_token_reads_its_active_parameters_and_one_row_of_the_embeddings():
    read = sum(each.touched for each in weights(TINY, precision(TINY)).values())
    assert read == pytest.approx(2 * (total(TINY).active - TINY.embeddings + TINY.dim))


@pytest.mark.parametrize("bias", [0, 1000])
def test_a_tied_head_reads_the_whole_table(bias):
    tied = replace(TINY, head=bias)
    assert weights(tied, precision(tied))["embeddings"].touched == 2 * TINY.embeddings


def test_a_step_of_the_decoder_reads_nothing_of_the_encoder():
    both = replace(TINY, encoder=(LAYER,) * 3)
    formats = precision(TINY)
    assert (
        weights(both, formats)["attention"].touched == weights(TINY, formats)["attention"].touched
    )
    assert weights(both, formats)["experts"].resident == 7 / 4 * 2 * 4 * 8 * MOE.expert


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.sampled_from([None, "4", "2.5g64", "experts=3"]))
def test_more_tokens_read_no_less_and_never_more_than_there_is(few, many, bits):
    few, many = sorted((few, many))
    formats = precision(TINY, None, bits)
    for part, there in weights(TINY, formats, many).items():
        less = weights(TINY, formats, few)[part].touched
        assert 0 < less <= there.touched * (1 + 1e-12)
        assert there.touched <= there.resident * (1 + 1e-12)
