"""The rules that one or two families follow, against a loop over tokens in plain Python."""

import math

import pytest
import torch

from expertly.moe.routing import ROUTERS, biased_sigmoid_topk, softmax_topk, topk_sigmoid

EXPERTS, TOKENS = 8, 40
GROUPS = {"num_groups": 4, "topk_groups": 2}


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def best(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def normed(chosen, renormalize):
    total = sum(chosen.values()) if renormalize else 1.0
    return {i: weight / total for i, weight in chosen.items()}


def slow_sigmoid(row, top_k, bias, *, renormalize):
    return normed({i: sigmoid(row[i]) for i in best(row, top_k)}, renormalize)


def slow_biased_logits(row, top_k, bias, *, renormalize):
    steered = [z + b for z, b in zip(row, bias, strict=True)]
    return normed({i: sigmoid(row[i]) for i in best(steered, top_k)}, renormalize)


def slow_root(row, top_k, bias, *, scale):
    scores = [math.sqrt(math.log1p(math.exp(z))) for z in row]
    steered = [s + b for s, b in zip(scores, bias, strict=True)]
    chosen = normed({i: scores[i] for i in best(steered, top_k)}, True)
    return {i: scale * weight for i, weight in chosen.items()}


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("name", "slow", "options"),
    [
        ("topk_sigmoid", slow_sigmoid, {"renormalize": True}),
        ("sigmoid_topk", slow_sigmoid, {"renormalize": True}),
        ("sigmoid_topk", slow_sigmoid, {"renormalize": False}),
        ("biased_topk_sigmoid", slow_biased_logits, {"renormalize": True}),
        ("biased_topk_sigmoid", slow_biased_logits, {"renormalize": False}),
        ("biased_sqrtsoftplus_topk", slow_root, {"scale": 1.5}),
    ],
)
def test_a_rare_rule_is_its_loop_over_tokens(name, slow, options, top_k):
    logits, bias = random(TOKENS, EXPERTS, scale=2.0), random(EXPERTS, seed=1, scale=0.3)
    given = {"bias": bias} if ROUTERS[name].biased else {}
    routing = ROUTERS[name].route(logits, top_k, **options, **given)
    for token, row in enumerate(logits.double().tolist()):
        expected = slow(row, top_k, bias.double().tolist(), **options)
        pairs = zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True)
        assert dict(pairs) == pytest.approx(expected, rel=1e-5)


def test_the_sigmoid_before_or_after_the_choice_differs_in_rounding_only():
    logits = random(TOKENS, EXPERTS)
    before, after = (topk_sigmoid(logits, 3, of_all=of_all) for of_all in (True, False))
    assert before.experts.equal(after.experts)
    torch.testing.assert_close(before.weights, after.weights)


def test_a_group_is_worth_its_best_scores_together():
    logits = torch.tensor([[3.0, -9.0, 2.5, 2.4]])  # the best expert, or the two next ones
    options = {"num_groups": 2, "topk_groups": 1}
    assert softmax_topk(logits, 2, **options).experts.tolist() == [[0, 1]]
    assert softmax_topk(logits * 0.1, 2, best=2, **options).experts.tolist() == [[2, 3]]


def test_closed_experts_with_a_score_may_still_be_chosen():
    logits, bias = torch.zeros(1, EXPERTS), torch.full((EXPERTS,), -0.9)
    bias[:2] = torch.tensor([5.0, -1.4])  # in the best group, but one of them is below 0
    options = {"num_groups": 4, "topk_groups": 1, "bias": bias}
    assert set(biased_sigmoid_topk(logits, 2, **options).experts[0].tolist()) == {0, 1}
    assert 1 not in biased_sigmoid_topk(logits, 2, closed=0.0, **options).experts[0]


def test_epsilon_is_added_to_the_sum():
    logits, bias = random(TOKENS, EXPERTS), torch.zeros(EXPERTS)
    plain = biased_sigmoid_topk(logits, 2, bias=bias, renormalize=False).weights
    weights = biased_sigmoid_topk(logits, 2, bias=bias, epsilon=0.5).weights
    torch.testing.assert_close(weights, plain / (plain.sum(-1, keepdim=True) + 0.5))


def test_ordered_puts_the_best_expert_first():
    logits, bias = random(TOKENS, EXPERTS), random(EXPERTS, seed=1, scale=0.3)
    experts = biased_sigmoid_topk(logits, 4, bias=bias, ordered=True).experts
    steered = (logits.sigmoid() + bias).gather(-1, experts)
    assert (steered.diff(dim=-1) <= 0).all()
