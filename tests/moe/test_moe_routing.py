"""Every rule against a slow loop over tokens, and bit by bit against transformers' own routers."""

import math
from inspect import signature

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from expertly.moe.routing import (
    ROUTERS,
    Routing,
    biased_sigmoid_topk,
    biased_softmax_topk,
    drop,
    expert_choice,
    gshard_top2,
    jitter,
    softmax_topk,
    sparsemixer,
    switch_top1,
    tokens_per_expert,
    topk_sigmoid,
    topk_softmax,
)

EXPERTS = 8


def random_logits(tokens=40, experts=EXPERTS, seed=0, scale=2.0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * scale


def random_bias(seed=1):
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed)) * 0.3


# --- The slow definitions: one token, plain Python ----------------------------------------------


def shares(row):
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [p / sum(powers) for p in powers]


def sigmoids(row):
    return [1 / (1 + math.exp(-z)) for z in row]


def best(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def open_experts(values, num_groups, topk_groups, count):
    """The experts of the best groups; a group is worth the sum of its `count` highest values."""
    size = len(values) // num_groups
    worth = [
        sum(sorted(values[g * size : (g + 1) * size], reverse=True)[:count])
        for g in range(num_groups)
    ]
    groups = best(worth, topk_groups)
    return [i for i in range(len(values)) if i // size in groups]


def slow_softmax(row, top_k, bias, *, renormalize=True, num_groups=1, topk_groups=1, scale=1.0):
    p = shares(row)
    allowed = open_experts(p, num_groups, topk_groups, 1)
    chosen = [i for i in best(p, len(p)) if i in allowed][:top_k]
    total = sum(p[i] for i in chosen) if renormalize else 1.0
    return {i: scale * p[i] / total for i in chosen}


def slow_topk_softmax(row, top_k, bias):
    chosen = best(row, top_k)
    return dict(zip(chosen, shares([row[i] for i in chosen]), strict=True))


def slow_topk_sigmoid(row, top_k, bias):
    return {i: sigmoids(row)[i] for i in best(row, top_k)}


def slow_sparsemixer(row, top_k, bias, *, tolerance=0.01):
    """Two rounds of: the best one, among those within 2 x tolerance of it, relative to the row."""
    chosen, left = {}, set(range(len(row)))
    for _ in range(2):
        first = max(left, key=lambda i: row[i])
        near = [
            i for i in left if (row[first] - row[i]) / max(abs(row[i]), row[first]) <= 2 * tolerance
        ]
        chosen[first] = dict(zip(near, shares([row[i] for i in near]), strict=True))[first]
        left.remove(first)
    return chosen


def slow_biased_sigmoid(
    row, top_k, bias, *, renormalize=True, num_groups=1, topk_groups=1, scale=1.0
):
    s = sigmoids(row)
    steered = [a + b for a, b in zip(s, bias, strict=True)]
    allowed = open_experts(steered, num_groups, topk_groups, 2)
    chosen = [i for i in best(steered, len(s)) if i in allowed][:top_k]
    total = sum(s[i] for i in chosen) if renormalize else 1.0
    return {i: scale * s[i] / total for i in chosen}


def slow_biased_softmax(row, top_k, bias, *, minimum=1e-12):
    p = shares(row)
    chosen = best([a + b for a, b in zip(p, bias, strict=True)], top_k)
    total = max(sum(p[i] for i in chosen), minimum)
    return {i: p[i] / total for i in chosen}


GROUPS = {"num_groups": 4, "topk_groups": 2}
RULES = [
    pytest.param("softmax_topk", slow_softmax, 2, {}, id="mixtral"),
    pytest.param("softmax_topk", slow_softmax, 3, {"renormalize": False}, id="olmoe"),
    pytest.param("softmax_topk", slow_softmax, EXPERTS, {}, id="all experts"),
    pytest.param(
        "softmax_topk", slow_softmax, 3, {**GROUPS, "renormalize": False, "scale": 16.0}, id="v2"
    ),
    pytest.param("topk_softmax", slow_topk_softmax, 4, {}, id="gpt-oss"),
    pytest.param("topk_sigmoid", slow_topk_sigmoid, 2, {}, id="llama4"),
    pytest.param("sparsemixer", slow_sparsemixer, 2, {}, id="phimoe"),
    pytest.param("sparsemixer", slow_sparsemixer, 2, {"tolerance": 0.2}, id="near ties"),
    pytest.param("switch_top1", lambda *a: slow_softmax(*a, renormalize=False), 1, {}, id="switch"),
    pytest.param("gshard_top2", slow_softmax, 2, {}, id="gshard in evaluation"),
    pytest.param("biased_sigmoid_topk", slow_biased_sigmoid, 2, {}, id="no groups"),
    pytest.param("biased_sigmoid_topk", slow_biased_sigmoid, 3, {**GROUPS, "scale": 2.5}, id="v3"),
    pytest.param(
        "biased_sigmoid_topk", slow_biased_sigmoid, 2, {"renormalize": False}, id="raw sigmoid"
    ),
    pytest.param("biased_softmax_topk", slow_biased_softmax, 3, {}, id="ernie"),
    pytest.param("biased_softmax_topk", slow_biased_softmax, 2, {"minimum": 0.9}, id="floor"),
]


@pytest.mark.parametrize(("name", "slow", "top_k", "options"), RULES)
def test_a_rule_is_its_loop_over_tokens(name, slow, top_k, options):
    logits, bias = random_logits(), random_bias()
    needs_bias = {"bias": bias} if ROUTERS[name].biased else {}
    routing = ROUTERS[name].route(logits, top_k, **options, **needs_bias)
    for row, weights, experts in zip(
        logits.double().tolist(), routing.weights.tolist(), routing.experts.tolist(), strict=True
    ):
        expected = slow(row, top_k, bias.double().tolist(), **options)
        assert set(experts) == set(expected)
        for expert, weight in zip(experts, weights, strict=True):
            assert weight == pytest.approx(expected[expert], rel=1e-5)


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.causal])
def test_shapes_dtypes_and_float32_under_bfloat16_logits(name):
    logits = random_logits().bfloat16()
    top_k = ROUTERS[name].top_k or 2
    needs_bias = {"bias": random_bias()} if ROUTERS[name].biased else {}
    route = ROUTERS[name].route
    routing = route(logits, top_k, **needs_bias)
    assert routing.logits.shape == (40, EXPERTS)
    assert routing.weights.shape == routing.experts.shape == (40, top_k)
    assert (routing.weights.dtype, routing.experts.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(
        routing.weights, route(logits.float(), top_k, **needs_bias).weights, rtol=0, atol=0
    )
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())


@pytest.mark.parametrize("name", ROUTERS)
def test_what_the_table_says_about_a_rule_is_so(name):
    router = ROUTERS[name]
    takes = signature(router.route).parameters
    assert (router.biased, router.draws) == ("bias" in takes, "draw" in takes)
    total = router.score(random_logits()).sum(dim=-1)
    assert router.sums_to_one == torch.allclose(total, torch.ones(40))
    if router.plain is not None:
        rule, options = router.plain
        assert ROUTERS[rule].plain is None and set(options) <= set(
            signature(ROUTERS[rule].route).parameters
        )


# --- Bit by bit against transformers ------------------------------------------------------------


def config_of(kind, **own):
    common = {"hidden_size": 16, "num_experts_per_tok": 3}
    return kind(**common, **own)


DEEPSEEK = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2}
FAMILIES = [
    pytest.param(
        MixtralTopKRouter,
        config_of(MixtralConfig, num_local_experts=EXPERTS),
        softmax_topk,
        {"renormalize": True},
        id="mixtral",
    ),
    *(
        pytest.param(
            router,
            config_of(kind, num_experts=EXPERTS, norm_topk_prob=norm),
            softmax_topk,
            {"renormalize": norm},
            id=f"{kind.model_type}-{norm}",
        )
        for router, kind in (
            (OlmoeTopKRouter, OlmoeConfig),
            (Qwen3MoeTopKRouter, Qwen3MoeConfig),
        )
        for norm in (True, False)
    ),
    *(
        pytest.param(
            DeepseekV3TopkRouter,
            config_of(DeepseekV3Config, **DEEPSEEK, norm_topk_prob=norm, routed_scaling_factor=2.5),
            biased_sigmoid_topk,
            {"renormalize": norm, "num_groups": 4, "topk_groups": 2, "scale": 2.5},
            id=f"deepseek_v3-{norm}",
        )
        for norm in (True, False)
    ),
    pytest.param(
        DeepseekV2TopkRouter,
        config_of(
            DeepseekV2Config,
            **DEEPSEEK,
            num_attention_heads=4,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
        ),
        softmax_topk,
        {"renormalize": False, "num_groups": 4, "topk_groups": 2, "scale": 16.0},
        id="deepseek_v2",
    ),
    pytest.param(
        DeepseekV2TopkRouter,
        config_of(
            DeepseekV2Config,
            n_routed_experts=EXPERTS,
            num_attention_heads=4,
            topk_method="greedy",
        ),
        softmax_topk,
        {"renormalize": False},
        id="deepseek_v2-lite",
    ),
    pytest.param(
        Ernie4_5_MoeTopKRouter,
        Ernie4_5_MoeConfig(hidden_size=16, moe_num_experts=EXPERTS, moe_k=3),
        biased_softmax_topk,
        {},
        id="ernie",
    ),
    pytest.param(
        GptOssTopKRouter,
        config_of(GptOssConfig, num_local_experts=EXPERTS),
        topk_softmax,
        {},
        id="gpt_oss",
    ),
]


@pytest.mark.parametrize(("kind", "config", "rule", "options"), FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_familys_own_router_to_the_last_bit(kind, config, rule, options, seed):
    torch.manual_seed(seed)
    router = kind(config)
    for tensor in router.state_dict().values():  # the selection bias too
        tensor.normal_()
    logits, weights, experts = router(torch.randn(64, 16))
    bias = [b for name, b in router.state_dict().items() if "correction" in name]
    needs_bias = {"bias": bias[0].flatten()} if bias else {}
    ours = rule(logits, experts.shape[-1], **options, **needs_bias)
    # a token's choices are a set: DeepSeek-V2 does not sort its own
    (our_ids, our_order), (ids, order) = ours.experts.sort(-1), experts.sort(-1)
    assert torch.equal(our_ids, ids)
    assert torch.equal(ours.weights.gather(-1, our_order), weights.gather(-1, order))


# --- What each rule promises --------------------------------------------------------------------


@pytest.mark.parametrize("rule", [biased_sigmoid_topk, biased_softmax_topk])
def test_a_bias_moves_the_choice_and_never_the_weight(rule):
    logits, bias = random_logits(tokens=200), random_bias()
    before = rule(logits, 2, bias=bias)
    for expert in range(EXPERTS):  # finite differences, too small to change a choice
        nudged = bias.clone()
        nudged[expert] += 1e-6
        after = rule(logits, 2, bias=nudged)
        same = (after.experts == before.experts).all(dim=-1)
        assert same.float().mean() > 0.95
        assert torch.equal(after.weights[same], before.weights[same])
    pushed = bias.clone()
    pushed[3] += 10
    assert (rule(logits, 2, bias=pushed).experts == 3).any(dim=-1).all()


def test_no_gradient_reaches_the_bias():
    bias = torch.zeros(EXPERTS, requires_grad=True)
    logits = random_logits().requires_grad_()
    routing = biased_sigmoid_topk(logits, 2, bias=bias)
    (routing.weights * torch.randn_like(routing.weights)).sum().backward()
    assert bias.grad is None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_phimoes_own_router_to_the_last_bit(seed):
    torch.manual_seed(seed)
    config = PhimoeConfig(hidden_size=16, num_local_experts=EXPERTS, router_jitter_noise=0.2)
    router = PhimoeTopKRouter(config).eval()
    logits, weights, experts = router(torch.randn(64, 16))
    ours = sparsemixer(logits, 2, tolerance=0.2)
    assert torch.equal(ours.experts, experts) and torch.equal(ours.weights, weights)
    assert ((weights > 0) & (weights < 1)).any(), "ties, or that was not tried"


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_llama4s_own_router_to_the_last_bit(seed):
    torch.manual_seed(seed)
    config = Llama4TextConfig(hidden_size=16, num_local_experts=EXPERTS, num_experts_per_tok=3)
    scores, logits = Llama4Router(config)(torch.randn(64, 16))
    ours = topk_sigmoid(logits, 3)
    assert torch.equal(torch.zeros_like(scores).scatter(1, ours.experts, ours.weights), scores)


def test_the_order_of_the_experts_changes_no_weight():
    logits = random_logits(tokens=200)
    one, other = (softmax_topk(logits, 3, ordered=ordered) for ordered in (True, False))
    dense = [torch.zeros_like(logits).scatter(1, r.experts, r.weights) for r in (one, other)]
    torch.testing.assert_close(*dense)
    assert (one.weights.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("topk_groups", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", [softmax_topk, biased_sigmoid_topk])
def test_groups_limit_the_choice(rule, topk_groups):
    needs_bias = {"bias": random_bias() - 5} if rule is biased_sigmoid_topk else {}
    options = {"num_groups": 4, "topk_groups": topk_groups, **needs_bias}
    routing = rule(random_logits(tokens=500), 2, **options)
    groups = routing.experts // (EXPERTS // 4)
    assert max(len(set(row)) for row in groups.tolist()) <= topk_groups
    assert (routing.weights > 0).all()


def test_a_negative_bias_does_not_open_closed_groups():
    # a closed group at 0 instead of -inf would beat every biased score of an open one
    logits = torch.tensor([[4.0, 4.0, -4.0, -4.0]])
    bias = torch.full((4,), -3.0)
    routing = biased_sigmoid_topk(logits, 2, bias=bias, num_groups=2, topk_groups=1)
    assert sorted(routing.experts[0].tolist()) == [0, 1]


def test_gshard_uses_the_second_expert_with_probability_twice_its_weight():
    tokens = 20_000
    draw = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    for second in (0.0, 0.05, 0.25, 0.4, 0.5):
        odds = math.log(max(second, 1e-12) / (1 - second))
        logits = torch.tensor([0.0, odds, -50.0]).expand(tokens, 3)
        routing = gshard_top2(logits, draw=draw)
        assert routing.kept[:, 0].all()
        share = routing.kept[:, 1].float().mean().item()
        assert share == pytest.approx(min(1, 2 * second), abs=0.015)
        assert torch.equal(routing.weights[:, 1] > 0, routing.kept[:, 1])
        assert set(routing.experts[:, 1].tolist()) == {1}  # a dropped one keeps its id


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_expert_choice_gives_every_expert_exactly_its_share_of_tokens(top_k):
    routing = expert_choice(random_logits(tokens=32), top_k)
    assert tokens_per_expert(routing).tolist() == [32 * top_k // EXPERTS] * EXPERTS
    assert (routing.weights[~routing.kept] == 0).all()
    probs = random_logits(tokens=32).softmax(-1)
    for expert in range(EXPERTS):
        mine = set(probs[:, expert].topk(32 * top_k // EXPERTS).indices.tolist())
        takers, _ = torch.where((routing.experts == expert) & routing.kept)
        assert set(takers.tolist()) == mine


def earlier_routing_changes(rule):
    logits = torch.zeros(8, 2)
    logits[:, 0] = torch.arange(8) / 10
    before = rule(logits)
    logits[-1, 0] = -5.0  # only the last token
    after = rule(logits)
    return not all(
        torch.equal(a[:-1], b[:-1]) for a, b in zip(before[1:3], after[1:3], strict=True)
    )


def test_expert_choice_looks_at_later_tokens_and_token_choice_does_not():
    assert earlier_routing_changes(lambda logits: expert_choice(logits, 1))
    assert not earlier_routing_changes(lambda logits: softmax_topk(logits, 1))


def test_switch_weighs_by_the_probability_itself():
    logits = random_logits()
    routing = switch_top1(logits)
    torch.testing.assert_close(routing.weights[:, 0], logits.softmax(-1).amax(-1))


def test_jitter_multiplies_within_bounds():
    torch.manual_seed(0)
    x = torch.randn(1000, 16).bfloat16()
    factor = jitter(x, 0.01) / x.float()
    assert factor.dtype == torch.float32
    assert 0.99 - 1e-6 <= factor.min() < 0.9905 and 1.0095 < factor.max() <= 1.01 + 1e-6
    assert factor.unique().numel() > 1000  # bfloat16 would know four values


def test_a_drop_keeps_the_id_and_adds_to_what_was_dropped_before():
    routing = softmax_topk(random_logits(tokens=4), 2)
    first = drop(routing, torch.tensor([[True, False]]).expand(4, 2))
    both = drop(first, torch.tensor([[True], [False], [True], [True]]).expand(4, 2))
    assert both.kept.tolist() == [[True, False], [False, False], [True, False], [True, False]]
    assert torch.equal(both.experts, routing.experts)
    assert torch.equal(both.weights, routing.weights * both.kept)


def test_counts_honour_kept_and_padding():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1]])
    kept = torch.tensor([[True, True], [False, True], [True, True]])
    routing = Routing(torch.zeros(3, 4), torch.ones(3, 2), experts, kept)
    assert tokens_per_expert(routing).tolist() == [2, 2, 1, 0]
    valid = torch.tensor([True, True, False])
    assert tokens_per_expert(routing, valid).tolist() == [1, 1, 1, 0]
