"""A policy: what it decides in training and evaluation, what is left of it, what is refused."""

import math

import pytest
import torch

from expertly.errors import ExpertlyError
from expertly.moe.policy import Policy, check_policy, decide
from expertly.moe.routing import softmax_topk, tokens_per_expert, topk_softmax

ALL = torch.ones(16, dtype=torch.bool)


def skewed_logits():
    torch.manual_seed(0)
    return torch.randn(16, 4) + 3 * torch.arange(4)


def decided(policy, training, logits=None, valid=ALL, bias=None):
    logits = skewed_logits() if logits is None else logits
    return decide(policy, logits, valid, bias=bias, training=training)


@pytest.mark.parametrize("training", [True, False])
def test_without_capacity_the_choice_is_what_is_served(training):
    policy = Policy(router="softmax_topk", top_k=2, options={"renormalize": False})
    decision = decided(policy, training)
    assert decision.chosen is decision.served
    expected = softmax_topk(skewed_logits(), 2, renormalize=False)
    assert torch.equal(decision.chosen.weights, expected.weights)


def test_capacity_limits_training_and_evaluation_only_when_asked():
    policy = Policy(router="softmax_topk", top_k=2, capacity_factor=1.0)
    training, evaluation = decided(policy, True), decided(policy, False)
    assert training.served.kept is not None and not training.served.kept.all()
    assert evaluation.served is evaluation.chosen
    # balance losses see the collapse that capacity hides
    assert tokens_per_expert(training.chosen).max() > tokens_per_expert(training.served).max() == 8
    opted_in = Policy(router="softmax_topk", top_k=2, eval_capacity_factor=1.0)
    assert decided(opted_in, True).served.kept is None
    assert not decided(opted_in, False).served.kept.all()


def test_overflow_and_fill_are_passed_on():
    policy = Policy(router="switch_top1", top_k=1, capacity_factor=1.0, overflow="reroute")
    assert tokens_per_expert(decided(policy, True).served).tolist() == [4, 4, 4, 4]
    kept = [
        decided(
            Policy(router="switch_top1", top_k=1, capacity_factor=1.0, fill=fill), True
        ).served.kept
        for fill in ("token", "weight")
    ]
    assert not torch.equal(*kept)


def test_the_random_second_expert_is_for_training_and_follows_the_generator():
    policy = Policy(router="gshard_top2", top_k=2)
    torch.manual_seed(1)
    first = decided(policy, True, skewed_logits()).served
    torch.manual_seed(1)
    again = decided(policy, True, skewed_logits()).served
    assert torch.equal(first.kept, again.kept)
    assert not first.kept.all()
    assert decided(policy, False).served.kept is None


def test_the_bias_reaches_the_rules_that_have_one():
    policy = Policy(router="biased_sigmoid_topk", top_k=1)
    bias = torch.tensor([99.0, 0, 0, 0])
    assert (decided(policy, True, bias=bias).chosen.experts == 0).all()


@pytest.mark.parametrize(
    ("name", "top_k", "plain", "options"),
    [
        ("gshard_top2", 2, "softmax_topk", {"renormalize": True}),
        ("switch_top1", 1, "softmax_topk", {"renormalize": False}),
        ("topk_softmax", 2, "topk_softmax", {}),
        ("softmax_topk", 2, "softmax_topk", {}),
    ],
)
def test_at_inference_only_the_rule_is_left_and_it_decides_as_in_evaluation(
    name, top_k, plain, options
):
    policy = Policy(router=name, top_k=top_k, jitter=0.1, capacity_factor=1.0)
    left = policy.at_inference()
    assert left == Policy(router=plain, top_k=top_k, options=options)
    before, after = decided(policy, False).served, decided(left, False).served
    assert torch.equal(before.experts, after.experts)
    assert torch.equal(before.weights, after.weights)


def test_renormalised_softmax_and_softmax_over_the_chosen_are_one_function():
    first, second = softmax_topk(skewed_logits(), 2), topk_softmax(skewed_logits(), 2)
    assert torch.equal(first.experts, second.experts)
    torch.testing.assert_close(first.weights, second.weights)


V3 = "biased_sigmoid_topk"
REFUSED = [
    ("no_such", 2, {}, {}, "no such router"),
    ("softmax_top", 2, {}, {}, "FIX: write softmax_topk"),
    ("expert_choice", 2, {}, {}, "it looks at later tokens, so a causal model would cheat"),
    ("softmax_topk", 0, {}, {}, "top_k 0 with 8 experts"),
    ("softmax_topk", 9, {}, {}, "choose a top_k from 1 to 8"),
    ("switch_top1", 2, {}, {}, "its top_k is 1, not 2"),
    ("gshard_top2", 1, {}, {}, "set top_k to 2"),
    ("softmax_topk", 2, {"renormalise": True}, {}, "no option renormalise. FIX: write renorm"),
    ("switch_top1", 1, {"scale": 2.0}, {}, "no option scale"),
    (V3, 2, {"bias": [0.0]}, {}, "no option bias"),
    ("softmax_topk", 2, {"num_groups": "four"}, {}, "option num_groups is 'four'. FIX: set"),
    ("softmax_topk", 2, {"num_groups": 4.0}, {}, "num_groups is 4.0. FIX: set num_groups to an"),
    ("softmax_topk", 2, {"num_groups": True}, {}, "option num_groups is True"),
    ("softmax_topk", 2, {"topk_groups": None}, {}, "option topk_groups is None"),
    ("softmax_topk", 2, {"renormalize": "no"}, {}, "is 'no'. FIX: set renormalize to true or"),
    ("softmax_topk", 2, {"renormalize": 1}, {}, "option renormalize is 1"),
    (V3, 2, {"scale": "big"}, {}, "option scale is 'big'. FIX: set scale to a finite number"),
    (V3, 2, {"scale": False}, {}, "option scale is False"),
    (V3, 2, {"scale": math.nan}, {}, "option scale is nan"),
    (V3, 2, {"scale": -math.inf}, {}, "option scale is -inf"),
    (V3, 2, {"scale": 10**400}, {}, "set scale to a finite number"),
    ("biased_softmax_topk", 2, {"minimum": [1e-9]}, {}, "option minimum is [1e-09]"),
    ("gshard_top2", 2, {"draw": None}, {}, "no option draw"),
    ("softmax_topk", 2, {"num_groups": 3}, {}, "8 experts in 3 groups"),
    ("softmax_topk", 2, {"num_groups": 0}, {}, "8 experts in 0 groups"),
    (V3, 2, {"num_groups": 8}, {}, "equal groups of at least 2"),
    ("softmax_topk", 2, {"num_groups": 8, "best": 2}, {}, "equal groups of at least 2"),
    ("softmax_topk", 2, {"num_groups": 4, "best": 3}, {}, "equal groups of at least 3"),
    ("softmax_topk", 2, {"num_groups": 4, "best": 0}, {}, "option best is 0"),
    ("softmax_topk", 2, {"best": -1}, {}, "option best is -1"),
    ("biased_softmax_topk", 2, {"scale": 2.0}, {}, "no option scale"),
    ("softmax_topk", 2, {"num_groups": 4, "topk_groups": 5}, {}, "5 of 4 groups"),
    ("softmax_topk", 2, {"num_groups": 4, "topk_groups": 0}, {}, "0 of 4 groups"),
    ("softmax_topk", 3, {"num_groups": 4}, {}, "1 of 4 groups hold fewer than top_k experts"),
    ("softmax_topk", 2, {}, {"capacity_factor": 0.0}, "a capacity factor must be above 0"),
    ("softmax_topk", 2, {}, {"capacity_factor": float("nan")}, "a capacity factor must be above 0"),
    ("softmax_topk", 2, {}, {"capacity_factor": float("inf")}, "a capacity factor must be above 0"),
    ("softmax_topk", 2, {}, {"eval_capacity_factor": -1.0}, "must be above 0"),
    ("softmax_topk", 2, {}, {"jitter": 1.0}, "jitter 1.0"),
    ("softmax_topk", 2, {}, {"jitter": -0.1}, "choose one from 0 to below 1"),
]


@pytest.mark.parametrize(("name", "top_k", "options", "limits", "text"), REFUSED)
def test_a_policy_that_cannot_work_is_refused_with_the_reason(name, top_k, options, limits, text):
    with pytest.raises(ExpertlyError) as refusal:
        check_policy(Policy(router=name, top_k=top_k, options=options, **limits), 8)
    assert (refusal.value.code, refusal.value.exit_code) == ("E204", 2)
    assert text in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "top_k", "options"),
    [
        ("softmax_topk", 8, {"renormalize": False, "scale": 2.0}),
        ("softmax_topk", 2, {"num_groups": 8, "topk_groups": 2}),
        ("softmax_topk", 2, {"num_groups": 4, "topk_groups": 2, "best": 2}),
        (V3, 4, {"num_groups": 4, "topk_groups": 2, "scale": 2.5}),
        (V3, 4, {"scale": 2}),
        ("biased_softmax_topk", 2, {"minimum": 1e-9}),
        ("topk_softmax", 4, {}),
        ("switch_top1", 1, {}),
        ("gshard_top2", 2, {}),
    ],
)
def test_every_other_router_is_accepted(name, top_k, options):
    check_policy(Policy(router=name, top_k=top_k, options=options), 8)
