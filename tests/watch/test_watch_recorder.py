"""The recorder against counting by hand: splits, padding, drops, and the losses it reports."""

import pytest
import torch

from expertly.errors import ExpertlyError
from expertly.moe.losses import Totals, balance_counts, load_balancing_loss, probabilities, z_loss
from expertly.moe.policy import Policy, decide
from expertly.moe.routing import Tokens
from expertly.watch.recorder import Recorder, count_decisions
from expertly.watch.stats import LayerCounts, layer_stats, watch_set

LAYERS, TOKENS, EXPERTS = 3, 24, 4
POLICY = Policy(router="softmax_topk", top_k=2)


def batch(policy=POLICY, pad=0, rows=slice(None), training=True):
    """The decisions of LAYERS routers on the same random tokens, the last `pad` of them padding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator) + torch.arange(EXPERTS)
    valid = (torch.arange(TOKENS) < TOKENS - pad)[rows]
    tokens = Tokens(valid, torch.zeros_like(valid, dtype=torch.long))
    bias = torch.zeros(EXPERTS)
    decisions = [
        decide(policy, layer[rows].requires_grad_(), valid, bias=bias, training=training)
        for layer in logits
    ]
    return decisions, [tokens] * LAYERS


def test_counts_are_those_made_by_hand():
    decisions, tokens = batch(pad=5)
    counts = count_decisions(decisions, tokens, "softmax_topk")
    assert counts.tokens.tolist() == [TOKENS - 5] * LAYERS
    assert all(values.dtype == torch.float64 and not values.requires_grad for values in counts)
    for index, decision in enumerate(decisions):
        load, mass = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
        for token in range(TOKENS - 5):
            chosen = decision.served.experts[token], decision.served.weights[token]
            for expert, weight in zip(*chosen, strict=True):
                load[expert] += 1
                mass[expert] += weight.item()
        assert counts.load[index].tolist() == counts.chosen[index].tolist() == load.tolist()
        assert counts.mass[index].tolist() == pytest.approx(mass.tolist())
        probs = decision.chosen.logits[: TOKENS - 5].softmax(-1)
        assert counts.confidence[index].item() == pytest.approx(probs.amax(-1).sum().item())
        assert counts.probs[index].tolist() == pytest.approx(probs.sum(0).tolist())


def test_micro_batches_add_up_to_one_batch_and_a_read_starts_again():
    recorder = Recorder("softmax_topk")
    for rows in (slice(0, 1), slice(1, 10), slice(10, TOKENS)):
        recorder.add(*batch(pad=3, rows=rows))
    split = recorder.read()
    recorder.add(*batch(pad=3))
    whole = recorder.read()
    assert torch.equal(split.load, whole.load) and torch.equal(split.chosen, whole.chosen)
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # summed in float32
    with pytest.raises(ExpertlyError, match="E504"):
        recorder.read()


def test_padding_is_not_counted():
    decisions, tokens = batch(pad=9)
    bare = batch(rows=slice(0, TOKENS - 9))
    for padded, alone in zip(
        count_decisions(decisions, tokens, "softmax_topk"),
        count_decisions(*bare, "softmax_topk"),
        strict=True,
    ):
        torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_dropped_assignments_are_counted_as_chosen_and_not_as_load(overflow):
    policy = Policy(router="softmax_topk", top_k=2, capacity_factor=0.5, overflow=overflow)
    decisions, tokens = batch(policy)
    counts = count_decisions(decisions, tokens, "softmax_topk")
    kept = torch.stack([d.served.kept.double().mean() for d in decisions])
    assert counts.load.max() <= 6  # 24 tokens x 2 / 4 experts x 0.5
    assert (counts.chosen.sum(-1) == TOKENS * 2).all()
    torch.testing.assert_close(layer_stats(counts)["dropped_frac"], 1 - kept)
    assert watch_set(counts)["dropped_frac"] > 0.4
    mass = [(d.served.weights * d.served.kept).sum().item() for d in decisions]
    assert counts.mass.sum(-1).tolist() == pytest.approx(mass)


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("name", ["softmax_topk", "biased_sigmoid_topk"])
def test_the_losses_reported_are_the_losses_trained_on(name, capacity_factor):
    policy = Policy(router=name, top_k=2, capacity_factor=capacity_factor)
    decisions, tokens = batch(policy, pad=4)
    stats = watch_set(count_decisions(decisions, tokens, name))
    totals = Totals(TOKENS - 4, 1)
    aux, z = [], []
    for decision in decisions:
        chosen = decision.chosen
        share = balance_counts(chosen, tokens[0].valid) / totals.tokens
        probs = probabilities(chosen.logits, name)
        aux.append(load_balancing_loss(probs, tokens[0].valid, share, totals).item())
        z.append(z_loss(chosen.logits, tokens[0].valid, totals).item())
    assert stats["aux_loss"] == pytest.approx(sum(aux) / LAYERS)
    assert stats["z_loss"] == pytest.approx(sum(z) / LAYERS)


def test_an_empty_micro_batch_adds_nothing():
    recorder = Recorder("softmax_topk")
    recorder.add(*batch())
    recorder.add(*batch(rows=slice(0, 0)))
    both = recorder.read()
    assert isinstance(both, LayerCounts) and both.tokens.tolist() == [TOKENS] * LAYERS


def test_a_read_over_ranks_is_their_sum():
    recorder = Recorder("softmax_topk")
    recorder.add(*batch())
    alone = count_decisions(*batch(), "softmax_topk")
    counts = recorder.read(lambda tensors: [2 * values for values in tensors])
    assert isinstance(counts, LayerCounts)
    assert all(torch.equal(two, 2 * one) for two, one in zip(counts, alone, strict=True))


def test_what_is_read_lies_on_the_cpu():
    recorder = Recorder("softmax_topk")
    recorder.add(*batch())
    assert {values.device.type for values in recorder.read()} == {"cpu"}
