"""The rules of the advice, each on both sides of its bound."""

from dataclasses import replace

import pytest
from shapes import facts, usual_tokens

from expertly.plan import reasons
from expertly.plan.advice import advise
from expertly.plan.options import stays
from expertly.plan.units import gb


def test_what_can_be_held_is_no_reason():
    assert reasons.cannot_be_held(facts()) is None
    assert reasons.cannot_be_held(facts("mixtral-8x7b", "h100", 2)) is None


def test_memory_below_need_decides():
    reason = reasons.cannot_be_held(facts(memory=3e9, ram=8e9))
    assert reason and reason.decides and reason.side == "dense"
    assert "17.2 GB, more than 1 x 4090 (3 GB) and 8 GB of RAM" in reason.text
    assert "assumed" not in reason.text


def test_what_no_link_takes_off_a_gpu_decides():
    """No room for the rest, however much lies elsewhere: 0.5 GB of cache, 1.6 of other weights."""
    for place in ({"ram": 1e12}, {"host_link": "nvme"}):
        crowded = facts(memory=2e9, **place)
        reason = reasons.cannot_be_held(crowded)
        assert reason and reason.decides
        least = gb(stays(crowded.shape, crowded.need))
        link = place.get("host_link", "pcie4")
        assert f"with the experts over {link} there stay {least}, more than 1 x" in reason.text
        assert "RAM" not in reason.text and "inf" not in reason.text


def test_an_offload_slower_than_reading_decides():
    reason = reasons.cannot_be_held(facts(memory=4e9, host_link="nvme"))
    assert reason and reason.decides
    assert "over nvme, makes" in reason.text
    assert "under the 5 of a reader" in reason.text


def test_the_pace_is_each_sequences():
    way = facts().ways[1]
    need = facts().need
    slow, fast = (replace(way, tokens_per_second=speed) for speed in (4.9, 5.1))
    assert reasons.usable((slow, fast), need) == (fast,)
    assert reasons.usable((fast,), replace(need, batch=2)) == ()
    assert reasons.usable((replace(slow, offloaded=0.0),), need) != ()
    assert reasons.usable((replace(fast, fits=False),), need) == ()


@pytest.mark.parametrize(
    ("tokens", "decides", "words"),
    [(9.9e6, True, "9.9 M tokens is small"), (1e7, False, "10 M tokens is large enough")],
)
def test_a_small_fine_tuning_set_decides(tokens, decides, words):
    reason = reasons.small_set(facts("mixtral-8x7b", "h100", 2, tokens=tokens))
    assert reason and reason.side == "dense"
    assert reason.decides == decides
    assert words in reason.text


def test_without_fine_tuning_its_set_is_no_reason():
    assert reasons.small_set(facts()) is None


def test_routing_decides_only_where_it_eats_the_gain():
    assert reasons.too_small_to_route(facts("olmoe-1b-7b")) is None  # 1.5 times as fast
    small = facts("switch-base-8")
    assert reasons.too_small_to_route(replace(small, tax=0.04)) is None
    reason = reasons.too_small_to_route(small)
    assert reason and reason.decides
    assert "routing takes 13% of a step" in reason.text


def test_a_dense_model_that_fits_far_more_easily_decides():
    crowded = facts("deepseek-v3", "h100")
    reason = reasons.outdone(crowded)
    assert reason and reason.decides
    assert "a dense model of 126 B, as good by the scaling law, fits more easily" in reason.text
    assert "80% of the experts" in reason.text
    shape = crowded.shape
    verdict = advise(shape, None, crowded.need, train_tokens=usual_tokens(shape))
    assert verdict.choice == "dense"


def test_one_that_nobody_trained_must_be_clearly_faster():
    """32 sequences of 32,768 tokens: a dense one made up is 1.1 times as fast, and less low-bit."""
    crowded = facts("mixtral-8x7b", "h100", batch=32, context=32768)
    assert reasons.outdone(crowded) is None
    real = replace(crowded, given=True, dense=crowded.peer)
    assert real.as_good
    assert reasons.outdone(real)


def test_what_fits_is_not_outdone():
    assert reasons.outdone(facts("mixtral-8x7b", "h100", 2, vs="llama-2-70b", batch=16)) is None


def test_a_given_model_as_good_and_faster_at_this_batch_decides():
    """Sixteen tokens touch all 8 experts: 93 GB against the 65 of a dense model."""
    crowd = facts("mixtral-8x7b", "h100", 2, vs="qwen3-32b", batch=16)
    reason = reasons.behind(crowd)
    assert reason and reason.decides
    assert "at batch 16 qwen3-32b, as good by the scaling law, is 1.1 times as fast" in reason.text
    assert reasons.behind(facts("mixtral-8x7b", "h100", 2, vs="qwen3-32b")) is None
    made_up = reasons.behind(facts("mixtral-8x7b", "h100", 2, batch=16))
    assert made_up and not made_up.decides


def test_a_smaller_one_does_not_count_as_as_good():
    small = facts("mixtral-8x7b", "h100", 2, vs="llama-3.2-3b", batch=16)
    assert not small.as_good
    assert small.peer is not small.dense
    assert small.named is small.dense
    assert facts(vs="llama-2-70b").as_good
    assert not facts().as_good


def test_one_gpu_is_simpler_than_several():
    two = facts("mixtral-8x7b", "h100", 2)
    reason = reasons.several_gpus(two)
    assert reason and not reason.decides
    assert "a dense model of 19.7 B runs on one h100, the MoE takes 2 of them" in reason.text
    cpu = reasons.several_gpus(facts("mixtral-8x7b", "cpu", memory=64e9))
    assert cpu and "runs on one cpu, the MoE takes 2 of them" in cpu.text
    assert reasons.several_gpus(facts("olmoe-1b-7b")) is None  # it runs on one itself
    assert reasons.several_gpus(facts("mixtral-8x7b", "h100", 2, vs="llama-2-70b")) is None


def test_several_gpus_decide_where_they_are_no_faster():
    few, crowd = (facts("mixtral-8x7b", "h100", 2, vs="qwen3-32b", batch=batch) for batch in (1, 5))
    assert (reason := reasons.several_gpus(few)) and not reason.decides
    assert 1 / reasons.LEAD < crowd.here.ratio < reasons.LEAD
    assert reasons.behind(crowd) is None
    assert (reason := reasons.several_gpus(crowd)) and reason.decides
    assert "is no faster at this batch" in reason.text


def test_it_fits_or_it_does_not():
    fits, misses = facts("mixtral-8x7b", "h100", 2), facts()
    assert reasons.misses(fits) is None
    assert reasons.holds(misses) is None
    assert (held := reasons.holds(fits)) and held.side == "MoE"
    left = 160e9 - fits.held.total.resident
    sequences = int(left / (32 * 2048 * 2 * 4096))
    assert f"room for the KV cache of {sequences:,} more sequences" in held.text
    assert (missed := reasons.misses(misses)) and missed.side == "dense"
    huge = reasons.misses(facts("deepseek-v3", memory=4e9))
    assert huge and "256 GPUs would hold it" in huge.text
    tiny = reasons.misses(facts("deepseek-v3", memory=1e9))
    assert tiny and "4,096 GPUs would not hold it" in tiny.text


def test_the_lead_is_said_and_when_it_fades():
    one = reasons.leads(facts("mixtral-8x7b", "h100", 2))
    assert one and one.side == "MoE"
    assert "2.7 times those of a dense model with all its parameters" in one.text
    assert "that lead is halved from batch 4 on" in one.text
    four = reasons.leads(facts("mixtral-8x7b", "h100", 2, batch=4))
    assert four and four.side == "MoE" and "(at batch 1 2.7 times)" in four.text
    none = reasons.leads(facts("mixtral-8x7b", "h100", 2, batch=16))
    assert none and none.side == "dense" and "no lead (at batch 1 2.7 times)" in none.text
    wish = reasons.leads(facts())
    assert wish and "it would make, if it fitted," in wish.text


def test_the_law_says_what_it_is_worth_and_that_it_extrapolates():
    reason = reasons.is_worth(facts())
    assert reason and reason.side == "MoE"
    assert "scaling law, here extrapolated, it is as good as a dense model of 19.7 B" in reason.text
    larger = reasons.is_worth(facts(vs="llama-2-70b"))
    assert larger and larger.side == "dense" and "compare real scores" in larger.text
    inside = reasons.is_worth(replace(facts(), extrapolated=False))
    assert inside and "extrapolated" not in inside.text


def test_a_step_that_varies_is_said():
    few = facts("mixtral-8x7b", "h100", 2, batch=4)
    reason = reasons.unsteady(few)
    spread = few.here.moe.sigma / few.here.moe.seconds
    assert reason and not reason.decides
    assert f"varies by {spread:.1%}" in reason.text
    assert reasons.unsteady(facts("mixtral-8x7b", "h100", 2)) is None  # one token: always 2 of 8
