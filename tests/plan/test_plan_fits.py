"""What fits: the best format of each model, the fastest model first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.plan.fits import fits
from expertly.plan.hardware import device_of
from expertly.plan.known import known, shape_of

RTX = device_of("4090")
SOME = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
MORE = ("deepseek-v3", "llama-3.2-3b", "gpt-oss-20b")
SHAPES = [shape_of(name) for name in SOME + MORE]

# by hand: bf16 is 2 bytes a parameter, int4 (4 + 20 / 128) / 8, int3 (3 + 19 / 128) / 8
IN_24GB = {
    "olmoe-1b-7b": ("bf16", "", 0),  # 13.8 GB
    "qwen3-30b-a3b": ("int4", "--bits 4", 0.5),  # 61 GB; 32 GB in 8 bits
    "mixtral-8x7b": ("int3 (attention int4)", "--bits 3,attention=4", 0.43),  # 24.3 GB in 4
    "llama-3.2-3b": ("bf16", "", 0),
    "gpt-oss-20b": ("mxfp4 (attention bf16)", "", 0),  # as its checkpoint
}


def test_each_model_has_the_best_format_that_fits():
    found = {fit.name: fit for fit in fits(SHAPES, 24e9, RTX)}
    assert set(found) == set(IN_24GB)  # 671 B parameters do not
    for name, (precision, flags, lost) in IN_24GB.items():
        fit = found[name]
        assert (fit.precision, fit.flags) == (precision, flags)
        assert fit.quality == pytest.approx(lost)
        assert fit.resident <= 24e9


def test_a_fit_says_what_it_is():
    (fit,) = fits([shape_of("mixtral-8x7b")], 24e9, RTX)
    assert (fit.total, fit.active, fit.known) == (46702792704, 12879925248, "measured")
    assert 18.97e9 < fit.resident < 20.1e9  # EAC-MoE's 18.98 GB, 0.54 of cache, activations


def test_the_layouts_are_those_of_the_advice():
    """17.2 GB at 2.5 bits: the last resort there, and so here."""
    (fit,) = fits([shape_of("mixtral-8x7b")], 18e9, RTX)
    assert fit.flags == "--bits 2.5,attention=4"


def test_the_fastest_is_first():
    speeds = [fit.tokens_per_second for fit in fits(SHAPES, 24e9, RTX)]
    assert len(speeds) == 5
    assert speeds == sorted(speeds, reverse=True)


def test_the_cache_counts():
    shape = shape_of("llama-2-7b")  # 13.5 GB, and 0.5 MB of cache a token
    (short,) = fits([shape], 16e9, RTX, context=1024)
    (long,) = fits([shape], 16e9, RTX, context=16384)
    (small,) = fits([shape], 16e9, RTX, context=4096, kv_bits=4)
    assert (short.precision, long.precision, small.precision) == ("bf16", "int8", "bf16")
    assert small.quality == pytest.approx(0.5)


@given(st.floats(1e8, 2e12), st.floats(1, 8))
def test_more_memory_never_loses_a_model_nor_quality(memory, factor):
    less = {fit.name: fit.quality for fit in fits(SHAPES[:3], memory, RTX)}
    more = {fit.name: fit.quality for fit in fits(SHAPES[:3], memory * factor, RTX)}
    assert all(more[name] <= lost for name, lost in less.items())


def test_nothing_fits_into_nothing_and_all_into_enough():
    assert fits(SHAPES, 1e6, RTX) == []
    everything = fits(map(shape_of, known()), 1e13, RTX)
    assert {fit.name for fit in everything} == set(known())
    assert {fit.known for fit in everything} == {"nothing lost"}


@pytest.mark.parametrize("wrong", [{"context": 0}, {"kv_bits": 0}])
def test_numbers_out_of_range_are_e208(wrong):
    with pytest.raises(ExpertlyError) as error:
        fits(SHAPES, 24e9, RTX, **wrong)
    assert error.value.code == "E208"
