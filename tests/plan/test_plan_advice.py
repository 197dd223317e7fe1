"""MoE, dense, or make it fit: known situations, checked by hand, and what always holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY, need_for, usual_tokens

from expertly.errors import ExpertlyError
from expertly.plan import reasons
from expertly.plan.advice import advise, dense_of, facts_of, routing
from expertly.plan.known import shape_of
from expertly.plan.precision import precision
from expertly.plan.shape import rival, total
from expertly.plan.speed import routing_tax


def ask(name, *machine, vs=None, tokens=None, train_tokens=None, bits=None, **changes):
    shape = shape_of(name)
    need = need_for(shape, *machine, bits=bits, **changes)
    dense, trained = shape_of(vs) if vs else None, train_tokens or usual_tokens(shape)
    return advise(shape, dense, need, train_tokens=trained, tokens=tokens)


# --- situations, checked by hand ---------------------------------------------------------------
def test_mixtral_on_one_4090_is_made_to_fit():
    verdict = ask("mixtral-8x7b")
    assert verdict.choice == "make it fit"
    assert "as asked it takes 94.4 GB of 1 x 4090 (24 GB)" in verdict.summary
    # 25.7 GB in 4 bits: a little comes over PCIe; 20 GB in 3 bits
    assert (
        "int4, 7% of the experts (1.69 GB) over pcie4 loses 0.24 points (assumed)"
        in verdict.summary
    )
    assert "int3 (attention int4) loses 0.43 points (measured)" in verdict.summary
    assert any("4 GPUs would hold it" in reason for reason in verdict.reasons)


def test_mixtral_on_two_h100_is_the_moe():
    verdict = ask("mixtral-8x7b", "h100", 2, vs="llama-2-70b")
    assert verdict.choice == "MoE"
    assert "94.9 GB of 2 x h100 (160 GB)" in verdict.summary
    assert "4.2 times those of llama-2-70b" in verdict.summary  # 5.3 in bytes, less launches
    assert verdict.options[0].flags == ""


def test_qwen3_30b_in_4_bits_on_a_4090_is_the_moe_and_fast():
    verdict = ask("qwen3-30b-a3b", bits="4")
    assert verdict.choice == "MoE"
    assert verdict.options[0].tokens_per_second > 200  # 1.8 GB a token of 1,008 GB/s, launches
    assert ask("qwen3-30b-a3b").choice == "make it fit"  # 61 GB in bf16


def test_olmoe_on_a_16_gb_laptop_is_the_moe():
    for laptop in ("cpu", "m4-max"):
        verdict = ask("olmoe-1b-7b", laptop, memory=16e9)
        assert verdict.choice == "MoE"
        assert "14.7 GB" in verdict.summary


def test_deepseek_v3_on_one_4090_is_no():
    verdict = ask("deepseek-v3")
    assert verdict.choice == "dense"
    assert "even at the fewest bits it takes 229 GB" in verdict.summary
    assert "96 GB of RAM" in verdict.summary
    assert not any(way.fits for way in verdict.options)
    assert "does not fit either, up to about 41.6 B would at 4 bits" in verdict.summary


def test_deepseek_v3_in_fp8_on_eight_h200_is_the_moe():
    verdict = ask("deepseek-v3", "h200", 8)
    assert verdict.choice == "MoE"
    assert verdict.options[0].what == "fp8"
    assert verdict.options[0].resident < 8 * 141e9


@pytest.mark.parametrize("gpu", ["4090", "h100", "cpu"])
def test_a_model_as_small_as_switch_base_8_pays_too_much_for_routing(gpu):
    verdict = ask("switch-base-8", gpu)
    assert verdict.choice == "dense"
    assert "too small for the routing tax" in verdict.reasons[0]


def test_a_small_dense_model_is_not_preferred_for_being_small():
    verdict = ask("mixtral-8x7b", "4090", vs="llama-3.2-3b")
    assert verdict.choice == "make it fit"
    assert any("llama-3.2-3b has 3.21 B" in reason for reason in verdict.reasons)


def test_where_nothing_is_faster_the_moe_is_not_sold_for_speed():
    verdict = ask("deepseek-v3", "h200", 8, batch=64)
    assert verdict.choice == "MoE"
    assert "though not for speed" in verdict.summary
    assert "at batch 1 4.5 times as fast" in verdict.summary


def test_a_verdict_gives_its_deciding_reason_first_and_its_own_side_next():
    verdict = ask("mixtral-8x7b", "h100", 2, tokens=1e6)
    sides = [reason.split(":")[0] for reason in verdict.reasons]
    assert verdict.reasons[0].startswith("for dense: a fine-tuning set of 1 M tokens is small")
    assert sides == sorted(sides, reverse=True)
    assert {"for dense", "for MoE"} == set(sides)
    moe = ask("mixtral-8x7b", "h100", 2)
    assert moe.reasons[0].startswith("for MoE")
    assert moe.reasons[-1].startswith("for dense")


def test_the_law_is_asked_for_the_tokens_that_it_is_trained_on():
    """The more tokens, the less more parameters help: it is as good as a smaller dense model."""
    said = [ask("mixtral-8x7b", "h100", 2, train_tokens=tokens).reasons for tokens in (None, 15e12)]
    assert any("as good as a dense model of 19.7 B" in reason for reason in said[0])
    assert any("as good as a dense model of 18 B" in reason for reason in said[1])


@pytest.mark.parametrize("name", ["mixtral-8x7b", "olmoe-1b-7b"])
def test_spread_over_more_gpus_than_it_takes_a_model_is_not_too_small(name):
    """A thousand GPUs wait for each other: that is no fault of its router."""
    assert ask(name, "h100", 1000).choice == "MoE"
    assert ask("switch-base-8", "h100", 1000).choice == "dense"


def test_routing_takes_what_it_takes_here():
    shape = shape_of("olmoe-1b-7b")
    need = need_for(shape, "h100", 4, batch=16, context=512, kv_bits=8)
    settings = {"batch": 16, "context": 512, "kv_bits": 8, "gpus": 4}
    expected = routing_tax(shape, need.precision, need.device, **settings)
    assert routing(shape, need) == expected
    assert facts_of(shape, None, need, train_tokens=1e12).tax == expected


# --- dense models alone ------------------------------------------------------------------------
def test_a_dense_model_is_only_made_to_fit():
    fits, not_at_all, small = (
        ask("llama-3.2-3b"),
        ask("llama-2-70b"),
        ask("llama-2-70b", memory=1e6),
    )
    assert (fits.choice, fits.reasons) == ("dense", ())
    assert "takes 7.02 GB of 1 x 4090 (24 GB)" in fits.summary
    assert not_at_all.choice == "make it fit"
    assert "bf16, 8 GPUs hold it" in not_at_all.summary
    assert (small.options, small.choice) == ((), "make it fit")
    assert "4,096 do not hold it either" in small.summary
    assert "int8 loses 0.1 points (assumed)" in ask("llama-2-13b").summary


# --- the dense model as good -------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "switch-base-8"])
def test_a_made_up_dense_model_has_the_parameters_asked_for(name):
    shape = shape_of(name)
    least, most = (total(rival(shape, memory=memory)).total for memory in (False, True))
    middle = (least + most) // 2
    made = dense_of(shape, middle)
    assert total(made).total == pytest.approx(middle, rel=1e-6)
    assert made.moe_layers == ()
    assert total(dense_of(shape, 1)).total == least
    assert total(dense_of(shape, float("inf"))).total == most


def test_both_are_compared_at_the_same_bits_unless_it_is_said():
    shape, dense = shape_of("mixtral-8x7b"), shape_of("llama-2-70b")
    need = need_for(shape, bits="4")
    trained = usual_tokens(shape)
    same = facts_of(shape, dense, need, train_tokens=trained)
    apart = facts_of(shape, dense, need, train_tokens=trained, dense_precision=precision(dense))
    assert same.named_held.weights.resident * 3.5 < apart.named_held.weights.resident


@given(
    st.sampled_from(["mixtral-8x7b", "gpt-oss-20b", "switch-base-8", "tiny"]),
    st.sampled_from([None, "llama-3-8b", "llama-2-70b"]),
    st.sampled_from(["4090", "h200", "cpu"]),
    st.floats(1e6, 2e11),
    st.integers(1, 9),
    st.integers(1, 2000),
    st.none() | st.floats(1, 1e12),
)
def test_there_is_always_one_verdict_that_holds(name, vs, gpu, memory, gpus, batch, tokens):
    shape = TINY if name == "tiny" else shape_of(name)
    need = need_for(shape, gpu, gpus, memory=memory, batch=batch)
    dense, trained = shape_of(vs) if vs else None, usual_tokens(shape)
    verdict = advise(shape, dense, need, train_tokens=trained, tokens=tokens)
    assert verdict.reasons and "\n" not in verdict.summary
    here = reasons.usable(verdict.options, need)
    if verdict.choice == "MoE":
        assert any(way.fits and not way.flags for way in verdict.options)
    if verdict.choice == "make it fit":
        assert here
    if not here:
        assert verdict.choice == "dense"


WRONG = [
    {"context": 0},
    {"batch": 0},
    {"kv_bits": 64},
    {"gpus": 0},
    {"memory": float("nan")},
    {"hit_rate": 1.5},
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3-8b"])
def test_numbers_out_of_range_are_e208(name, wrong):
    with pytest.raises(ExpertlyError) as error:
        ask(name, **wrong)
    assert error.value.code == "E208"


def test_no_tokens_to_fine_tune_on_is_e208():
    with pytest.raises(ExpertlyError, match="fine-tuning tokens") as error:
        ask("mixtral-8x7b", tokens=0)
    assert error.value.code == "E208"
