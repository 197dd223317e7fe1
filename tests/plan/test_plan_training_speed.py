"""A training step against sums made by hand, and against what has been measured elsewhere."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY

from expertly.errors import ExpertlyError
from expertly.plan.hardware import device_of, link_of
from expertly.plan.known import shape_of
from expertly.plan.shape import total
from expertly.plan.traffic import all_to_all
from expertly.plan.training import Layout, flops_per_token
from expertly.plan.training_speed import training_step

H100 = device_of("h100")
MIXTRAL, QWEN = map(shape_of, ("mixtral-8x7b", "qwen3-30b-a3b"))


def step(shape=MIXTRAL, device=H100, **given):
    return training_step(shape, device, **given)


def parts(shape=MIXTRAL, device=H100, **given):
    return step(shape, device, **given).by_part


def test_mixtral_on_16_h100_by_hand():
    found = step(layout=Layout(fsdp=16))
    # 12,748,587,008 active weights in products, 32 x 8,192 x 2,048.5 in pairs
    # forward and twice that backward; what is computed again does not count as reached
    compute = 3 * 2 * (12_748_587_008 + 537_001_984) * 4096 / (0.4 * 989e12)
    # in bf16: layers gathered twice, the root once, gradients once; 15 of 16 parts come, and 8
    # cards of 50 GB/s are slower than NVLink's 450
    layers, root = 46_440_644_608, 262_148_096
    fsdp = 2 * (3 * layers + 2 * root) * 15 / 16 / 400e9
    optimizer = 28 * 46_702_792_704 / 16 / 3.35e12
    assert compute == pytest.approx(0.825, abs=0.001)
    assert fsdp == pytest.approx(0.656, abs=0.001)
    expected = {"compute": compute, "fsdp": fsdp, "optimizer": optimizer}
    assert found.by_part == pytest.approx(expected | {"all_to_all": 0, "tensor_parallel": 0})
    assert found.seconds == pytest.approx(compute + optimizer)
    assert found.tokens_per_second == pytest.approx(16 * 4096 / found.seconds)


@pytest.mark.parametrize(
    ("layout", "measured"),
    [
        (Layout(tp=8), 3485),
        (Layout(fsdp=2, tp=4), 2900),
        (Layout(fsdp=4, tp=2), 2830),
        (Layout(fsdp=8, ep=8), 11_340),
    ],
)
def test_nothing_measured_is_above_the_roofline(layout, measured):
    """Full fine-tuning of Qwen3-30B-A3B on 8 x H100, tokens/s of each (NVIDIA, June 2026): stock
    transformers, and NeMo AutoModel with spread experts.
    """
    best = step(QWEN, layout=layout, imbalance=1, utilisation=1)
    assert measured < best.tokens_per_second / 8 < 4 * measured


def test_what_takes_longer_of_compute_and_fsdp_hides_the_other():
    slow = replace(H100, link=link_of("ethernet-10"))
    for device, longer in ((H100, "compute"), (slow, "fsdp")):
        found = step(device=device, layout=Layout(fsdp=4))
        assert longer == max(found.by_part, key=found.by_part.get)
        shown = found.by_part[longer] + found.by_part["optimizer"]
        assert found.seconds == pytest.approx(shown)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("method", "passes"), [("full", 3), ("lora", 2), ("qlora", 2)])
def test_passes_over_the_weights(method, passes, checkpointing):
    found = parts(method=method, checkpointing=checkpointing, utilisation=1)
    flops = 4096 * flops_per_token(MIXTRAL, context=4096) * (passes + checkpointing)
    assert found["compute"] == pytest.approx(flops / 989e12)


def test_fp32_is_computed_at_its_own_peak_and_sent_in_four_bytes():
    low, high = (parts(mixed=each, layout=Layout(fsdp=2)) for each in (True, False))
    assert high["compute"] == pytest.approx(low["compute"] * 989 / 67)
    assert high["fsdp"] == pytest.approx(2 * low["fsdp"])
    assert high["optimizer"] == low["optimizer"]


def test_with_few_tokens_reading_the_weights_takes_longer():
    read = 2 * (total(MIXTRAL).total - MIXTRAL.embeddings)  # 64 tokens need every expert
    found = parts(context=64, utilisation=1)
    assert found["compute"] == pytest.approx(4 * read / H100.bandwidth, rel=1e-4)


def test_adapters_are_all_that_lora_updates_and_reduces():
    full, lora = (parts(method=each, layout=Layout(fsdp=4)) for each in ("full", "lora"))
    assert lora["optimizer"] < full["optimizer"] / 50
    assert lora["fsdp"] == pytest.approx(full["fsdp"] * 2 / 3, rel=0.03)
    assert parts(method="qlora", layout=Layout(fsdp=4))["fsdp"] < lora["fsdp"] / 2


def test_experts_that_are_spread_are_not_gathered_but_sent_tokens():
    layout = Layout(fsdp=8, ep=8)
    found = parts(layout=layout, imbalance=2)
    sent = {"ranks": 8, "tokens": 4096, "passes": 3, "imbalance": 2}
    assert found["all_to_all"] == all_to_all(MIXTRAL, H100.link, **sent).seconds > 0
    fewer = parts(layout=layout, imbalance=2, checkpointing=False)
    assert fewer["all_to_all"] == pytest.approx(found["all_to_all"] * 2 / 3)
    together = parts(layout=Layout(fsdp=8))
    experts = 32 * 8 * MIXTRAL.layers[0].feed_forward.expert
    assert together["fsdp"] - found["fsdp"] == pytest.approx(3 * 2 * experts * 7 / 8 / 450e9)


def test_experts_beyond_a_machine_have_one_card_to_themselves():
    """With ep 8 on 16 GPUs an eighth of the experts is in two machines, on one GPU of each."""
    near, far = (parts(layout=Layout(fsdp=each, ep=8)) for each in (8, 16))
    experts = 32 * MIXTRAL.layers[0].feed_forward.expert
    dense = near["fsdp"] * 8 / 7 * 450e9
    expected = dense * 15 / 16 / 400e9 + 3 * 2 * experts / 2 / 50e9
    assert far["fsdp"] == pytest.approx(expected)
    assert far["all_to_all"] == near["all_to_all"]


def test_tensor_parallelism_reduces_twice_in_each_layer_and_pass():
    found = parts(layout=Layout(tp=4))
    size = 4096 * 4096 * 2
    once = 2 * (H100.link.latency + 3 / 4 * size / H100.link.bandwidth)
    assert found["tensor_parallel"] == pytest.approx(3 * 32 * 2 * once)
    assert found["fsdp"] == 0
    assert found["compute"] == pytest.approx(parts()["compute"] / 4)
    assert step(layout=Layout(tp=4)).tokens == 4096


@given(st.integers(1, 8), st.integers(1, 64), st.floats(0.05, 1))
def test_more_tokens_a_step_are_never_slower_per_token(batch, context, utilisation):
    given = {"layout": Layout(fsdp=8, ep=4), "context": context, "utilisation": utilisation}
    one, two = (step(TINY, batch=each, **given) for each in (batch, 2 * batch))
    assert two.tokens == 2 * one.tokens
    assert two.tokens_per_second >= one.tokens_per_second * (1 - 1e-9)
    assert two.seconds >= one.seconds


def test_e208_for_a_layout_that_cannot_be():
    with pytest.raises(ExpertlyError, match=r"E208.*--ep: is 3, which does not divide"):
        step(layout=Layout(fsdp=4, ep=3))
