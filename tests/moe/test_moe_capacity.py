"""Capacity: no expert beyond it, who overflows, where the overflow goes, and its gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.moe.capacity import expert_capacity, limit
from expertly.moe.routing import (
    ROUTERS,
    Routing,
    biased_sigmoid_topk,
    gshard_top2,
    softmax,
    softmax_topk,
    tokens_per_expert,
)

FILLS = ["token", "choice", "weight"]


@st.composite
def cases(draw, top_k=None):
    """A random routing with its scores, padding and capacity factor."""
    experts = draw(st.integers(1, 6))
    k = top_k or draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    skew = draw(st.sampled_from([0.0, 1.0, 8.0]))  # 8: all tokens want the same experts
    logits = torch.randn(tokens, experts, generator=generator)
    logits = logits + skew * torch.arange(experts)
    valid = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    factor = draw(st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 2.0, 100.0]))
    return softmax_topk(logits, k), valid, factor


def limited(routing, valid, factor, overflow="drop", fill="choice"):
    scores = softmax(routing.logits)
    return limit(routing, scores, valid, capacity_factor=factor, overflow=overflow, fill=fill)


def capacity_of(routing, valid, factor):
    tokens, top_k = int(valid.sum()), routing.experts.shape[-1]
    return expert_capacity(tokens, top_k, routing.logits.shape[-1], factor)


quick = settings(max_examples=60, deadline=None)


@quick
@given(case=cases(), fill=st.sampled_from(FILLS))
def test_dropping_keeps_every_id_and_zeroes_the_rest(case, fill):
    routing, valid, _ = case
    after = limited(*case, fill=fill)
    assert tokens_per_expert(after).max() <= capacity_of(*case)
    assert torch.equal(after.experts, routing.experts)
    assert torch.equal(after.weights, routing.weights * after.kept)
    assert not after.kept[~valid].any()
    # an expert turns nobody away while it has room
    wanted, load = tokens_per_expert(routing, valid), tokens_per_expert(after)
    assert torch.equal(load, wanted.clamp(max=capacity_of(*case)))


@quick
@given(case=cases(), fill=st.sampled_from(FILLS))
def test_rerouting_loses_nothing_that_could_be_placed(case, fill):
    routing, valid, _ = case
    dropped, after = limited(*case, fill=fill), limited(*case, overflow="reroute", fill=fill)
    load, capacity = tokens_per_expert(after), capacity_of(*case)
    assert load.max() <= capacity
    assert not after.kept[~valid].any()
    assert (after.weights[~after.kept] == 0).all()
    assert torch.equal(after.experts[dropped.kept], routing.experts[dropped.kept])
    assert torch.equal(after.weights[dropped.kept], routing.weights[dropped.kept])
    for experts, kept, wanted in zip(after.experts, after.kept, valid, strict=True):
        held = experts[kept].tolist()
        assert len(set(held)) == len(held)  # no expert twice
        if wanted and not kept.all():  # then whatever it does not hold is full
            assert all(load[e] == capacity for e in range(len(load)) if e not in held)


@quick
@given(case=cases(top_k=1), fill=st.sampled_from(FILLS))
def test_with_one_expert_per_token_and_room_for_all_nothing_is_dropped(case, fill):
    routing, valid, factor = case
    after = limited(routing, valid, max(factor, 1.0), "reroute", fill)
    assert torch.equal(after.kept[:, 0], valid)


@quick
@given(case=cases(), fill=st.sampled_from(FILLS), overflow=st.sampled_from(["drop", "reroute"]))
def test_padding_takes_no_room(case, fill, overflow):
    routing, valid, factor = case
    padded = limited(routing, valid, factor, overflow, fill)
    alone = Routing(routing.logits[valid], routing.weights[valid], routing.experts[valid])
    without = limited(alone, valid[valid], factor, overflow, fill)
    for with_padding, bare in zip(padded, without, strict=True):
        assert torch.equal(with_padding[valid], bare)


def slow_queue(routing, valid, capacity, fill):
    """Who gets room, one assignment after the other: {(token, slot)}."""
    tokens, top_k = routing.experts.shape
    weight = routing.weights.tolist()
    asks = []
    for token in range(tokens):
        ranked = sorted(range(top_k), key=lambda k: -weight[token][k])
        for rank, slot in enumerate(ranked):
            place = {"token": (token, rank), "choice": (rank, token)}
            asks.append((place.get(fill, (-weight[token][slot],)), token, slot))
    room = [capacity] * routing.logits.shape[-1]
    kept = set()
    for _, token, slot in sorted(asks, key=lambda ask: ask[0]):
        expert = routing.experts[token, slot]
        if valid[token] and room[expert] > 0:
            room[expert] -= 1
            kept.add((token, slot))
    return kept


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sort", [True, False])
def test_the_fill_order_is_the_slow_queues(fill, sort):
    torch.manual_seed(0)
    routing = softmax_topk(torch.randn(50, 6) + torch.arange(6) / 2, 3)
    if not sort:  # some routers return a token's choices in any order
        flip = torch.arange(50) % 2 == 0
        flipped = routing.weights.flip(-1), routing.experts.flip(-1)
        weights, experts = (
            torch.where(flip[:, None], b, a) for a, b in zip(routing[1:3], flipped, strict=True)
        )
        routing = routing._replace(weights=weights, experts=experts)
    valid = torch.rand(50) < 0.8
    after = limited(routing, valid, 0.6, fill=fill)
    kept = {tuple(place) for place in after.kept.nonzero().tolist()}
    assert kept == slow_queue(routing, valid, capacity_of(routing, valid, 0.6), fill)
    assert len(kept) < int(valid.sum()) * 3


def test_equal_weights_are_filled_in_token_order():
    routing = softmax_topk(torch.zeros(6, 2), 1)  # every token: the same expert, weight 1
    after = limited(routing, torch.ones(6, dtype=torch.bool), 1.0, fill="weight")
    assert after.kept[:, 0].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "capacity"),
    [
        (64, 1, 8, 1.0, 8),
        (64, 2, 8, 1.25, 20),
        (10, 1, 4, 1.0, 3),  # rounded up: room for everybody
        (100, 1, 10, 1.1, 11),  # not 12, though 100 * 1.1 is 110.00000000000001
        (7, 2, 8, 0.1, 1),
        (0, 2, 8, 1.0, 1),
    ],
)
def test_the_capacity_formula(tokens, top_k, experts, factor, capacity):
    assert expert_capacity(tokens, top_k, experts, factor) == capacity


@given(st.integers(0, 5000), st.integers(1, 8), st.integers(1, 300), st.floats(1.0, 3.0))
def test_a_factor_of_one_has_room_for_every_assignment(tokens, top_k, experts, factor):
    assert expert_capacity(tokens, top_k, experts, factor) * experts >= tokens * top_k


def test_an_assignment_that_the_router_skipped_takes_no_room_and_is_not_rerouted():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(6, 3)
    skipped = gshard_top2(logits, draw=torch.ones(6))  # no second expert at all
    after = limited(skipped, torch.ones(6, dtype=torch.bool), 0.75, "reroute")
    assert expert_capacity(6, 2, 3, 0.75) == 3
    assert after.kept[:, 0].all() and not after.kept[:, 1].any()
    assert tokens_per_expert(after).tolist() == [3, 3, 0]
    # the second choice was free, so it is the next one; its gate has the scale of the first
    first, second = softmax_topk(logits[:1], 2).weights[0].tolist()
    assert after.weights[:, 0].tolist() == pytest.approx([first] * 3 + [second] * 3)


@pytest.mark.parametrize("name", ["softmax_topk", "topk_softmax", "switch_top1"])
def test_a_rerouted_gate_is_the_next_score_as_the_rule_would_weigh_it(name):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(4, 4)
    top_k = 1
    routing = ROUTERS[name].route(logits, top_k)
    after = limited(routing, torch.ones(4, dtype=torch.bool), 1.0, "reroute")
    assert after.experts[:, 0].tolist() == [0, 1, 2, 3]
    scores = softmax(logits)[0]
    scale = routing.weights[0, 0] / scores[0]
    torch.testing.assert_close(after.weights[:, 0], scores * scale)


def test_rerouting_a_biased_router_goes_by_score_and_keeps_the_scale():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(2, 4)
    bias = torch.tensor([0.0, 0.0, 5.0, 0.0])
    routing = biased_sigmoid_topk(logits, 1, bias=bias, scale=2.5)
    assert routing.experts[:, 0].tolist() == [2, 2]
    valid = torch.ones(2, dtype=torch.bool)
    after = limit(routing, logits.sigmoid(), valid, capacity_factor=1.0, overflow="reroute")
    assert after.experts[:, 0].tolist() == [2, 0]
    s = logits[0].sigmoid()
    assert after.weights[1, 0].item() == pytest.approx(2.5 * s[0] / s[2])


def test_a_token_that_lost_two_choices_gets_two_different_experts():
    routing = softmax_topk(torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(4, 4), 2)
    after = limited(routing, torch.ones(4, dtype=torch.bool), 1.5, "reroute")
    assert after.experts.tolist() == [[0, 1]] * 3 + [[2, 3]]
    assert after.kept.all()


def test_overflow_is_rerouted_in_fill_order():
    # three tokens want expert 0, then expert 1; each takes one of them
    logits = torch.tensor([[1.0, 0.0, -9.0], [2.0, 0.0, -9.0], [3.0, 0.0, -9.0]])
    routing = softmax_topk(logits, 1, renormalize=False)
    after = limited(routing, torch.ones(3, dtype=torch.bool), 1.0, "reroute", "weight")
    assert after.experts[:, 0].tolist() == [2, 1, 0]  # the most certain first


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_gradient_flows_through_kept_and_rerouted_weights_only(overflow):
    torch.manual_seed(0)
    logits = (torch.randn(12, 4) + torch.arange(4)).requires_grad_()
    valid = torch.arange(12) < 9
    routing = softmax_topk(logits, 1, renormalize=False)
    after = limited(routing, valid, 0.75, overflow)
    (grad,) = torch.autograd.grad(after.weights.sum(), logits)
    served = after.kept.any(dim=-1)
    assert torch.equal(grad.abs().sum(-1) > 0, served)
    assert served.any() and not served.all()
    expected = softmax(logits).gather(-1, after.experts) * after.kept  # the gate as it is
    torch.testing.assert_close(after.weights, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("name", ["softmax_topk", "biased_sigmoid_topk"])
def test_a_batch_of_padding_drops_everything_with_finite_gradients(overflow, name):
    logits = torch.randn(5, 4, requires_grad=True)
    bias = {"bias": torch.zeros(4)} if ROUTERS[name].biased else {}
    routing = ROUTERS[name].route(logits, 2, **bias)
    scores = ROUTERS[name].score(logits)
    valid = torch.zeros(5, dtype=torch.bool)
    after = limit(routing, scores, valid, capacity_factor=1.0, overflow=overflow)
    assert not after.kept.any() and (after.weights == 0).all()
    (grad,) = torch.autograd.grad(after.weights.sum(), logits)
    assert (grad == 0).all()


def test_all_overflow_and_one_expert():
    routing = softmax_topk(torch.zeros(9, 1), 1)
    after = limited(routing, torch.ones(9, dtype=torch.bool), 1e-9, "reroute")
    assert after.kept[:, 0].tolist() == [True] + [False] * 8
    assert math.isclose(after.weights.sum().item(), 1.0)
