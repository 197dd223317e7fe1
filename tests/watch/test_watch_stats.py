"""Router statistics on loads made by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.watch import history
from expertly.watch.stats import (
    LayerCounts,
    divergence,
    evenness,
    layer_stats,
    overlap,
    specialisation,
    watch_set,
)


def counts_of(load, *, tokens=None, chosen=None, mass=None, probs=None, confidence=0.0, log_z=0.0):
    """Counts of hand-made loads, one row per layer; what is not given follows from the load."""
    load = torch.tensor(load, dtype=torch.float64)
    chosen = load if chosen is None else torch.tensor(chosen, dtype=torch.float64)
    mass = load if mass is None else torch.tensor(mass, dtype=torch.float64)
    tokens = float(load.sum(-1).max() if tokens is None else tokens)
    probs = load if probs is None else torch.tensor(probs, dtype=torch.float64)
    per_layer = torch.ones(len(load), dtype=torch.float64)
    return LayerCounts(
        load,
        chosen,
        mass,
        per_layer * confidence,
        per_layer * log_z,
        probs,
        per_layer * tokens,
    )


def test_an_even_load():
    stats = watch_set(counts_of([[4.0] * 8]))
    assert stats["load_cv"] == 0
    assert stats["max_load_ratio"] == stats["min_load_ratio"] == 1
    assert stats["dead_frac"] == stats["dropped_frac"] == stats["bias_range"] == 0
    assert stats["entropy_norm"] == pytest.approx(1, abs=1e-12)
    assert stats["mass_entropy_norm"] == pytest.approx(1, abs=1e-12)
    assert stats["effective_experts"] == pytest.approx(8)
    assert stats["aux_loss"] == pytest.approx(1)  # top_k is 1 here


def test_a_collapsed_load():
    stats = watch_set(counts_of([[0.0, 0.0, 32.0, 0.0]]))
    assert stats["load_cv"] == pytest.approx(math.sqrt(3))
    assert (stats["max_load_ratio"], stats["min_load_ratio"]) == (4, 0)
    assert stats["dead_frac"] == 0.75
    assert stats["entropy_norm"] == pytest.approx(0)
    assert stats["effective_experts"] == pytest.approx(1)
    assert stats["aux_loss"] == pytest.approx(4)
    assert stats["hottest_expert"] == 2


def test_one_dead_expert():
    stats = watch_set(counts_of([[10.0, 10.0, 0.0, 10.0]]))
    assert stats["dead_frac"] == 0.25 and stats["coldest_expert"] == 2
    assert stats["effective_experts"] == pytest.approx(3)
    assert stats["entropy_norm"] == pytest.approx(math.log(3) / math.log(4))


def test_load_and_mass_differ():
    stats = watch_set(counts_of([[8.0, 8.0]], mass=[[15.0, 1.0]]))
    assert stats["entropy_norm"] == pytest.approx(1)
    p = 15 / 16
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert stats["mass_entropy_norm"] == pytest.approx(entropy / math.log(2))


def test_means_over_layers_and_the_worst_layer():
    counts = counts_of([[4.0, 4.0], [7.0, 1.0], [5.0, 3.0]], confidence=4.0, log_z=16.0)
    stats, layers = watch_set(counts), layer_stats(counts)
    assert stats["worst_layer"] == 1
    assert (stats["hottest_expert"], stats["coldest_expert"]) == (0, 1)
    assert (stats["max_load_ratio"], stats["min_load_ratio"]) == (1.75, 0.25)
    assert stats["load_cv"] == pytest.approx((0 + 0.75 + 0.25) / 3)
    assert (stats["router_confidence"], stats["z_loss"]) == (0.5, 2.0)
    assert layers["max_load_ratio"].tolist() == [1.0, 1.75, 1.25]


def test_dropped_assignments():
    counts = counts_of([[4.0, 4.0], [4.0, 2.0]], chosen=[[6.0, 4.0], [6.0, 2.0]], tokens=10)
    assert layer_stats(counts)["dropped_frac"].tolist() == pytest.approx([0.2, 0.25])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_balancing_loss_per_assignment_is_1_at_balance_whatever_top_k(top_k):
    tokens, experts = 24, 8
    even = [tokens * top_k / experts] * experts
    collapsed = [float(tokens)] * top_k + [0.0] * (experts - top_k)
    probs = [[tokens / experts] * experts, [n / top_k for n in collapsed]]
    stats = layer_stats(counts_of([even, collapsed], tokens=tokens, probs=probs))
    assert stats["aux_loss"].tolist() == pytest.approx([top_k, experts])
    assert stats["aux_loss_per_k"].tolist() == pytest.approx([1, experts / top_k])


def test_no_token_leaves_finite_numbers():
    stats = layer_stats(counts_of([[0.0, 0.0]]))
    assert all(values.isfinite().all() for values in stats.values())


def test_the_range_of_the_bias_is_the_worst_layers():
    bias = torch.tensor([[0.0, 0.1], [-0.2, 0.3]])
    assert watch_set(counts_of([[1.0, 1.0]] * 2), bias)["bias_range"] == pytest.approx(0.5)


def test_nothing_counted_gives_finite_numbers_and_no_drops():
    stats = watch_set(counts_of([[0.0] * 4]))
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["dropped_frac"] == 0


def test_a_single_expert_is_always_even():
    stats = watch_set(counts_of([[7.0]]))
    assert (stats["entropy_norm"], stats["mass_entropy_norm"], stats["max_load_ratio"]) == (1, 1, 1)


def shannon(share):
    return -sum(p * math.log(p) for p in share if p > 0)


@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(1, 6))
def test_specialisation_is_the_divergence_written_out(seed, domains, experts):
    load = torch.randint(0, 9, (domains, 2, experts), generator=torch.Generator().manual_seed(seed))
    load[..., 0] += 1  # every domain has a token in every layer
    found = specialisation(load.double())
    for layer in range(2):
        shares = [[n / sum(row) for n in row] for row in load[:, layer].tolist()]
        mean = [sum(column) / domains for column in zip(*shares, strict=True)]
        by_hand = shannon(mean) - sum(map(shannon, shares)) / domains
        assert found[layer].item() == pytest.approx(by_hand / math.log(domains), abs=1e-9)
    assert ((found >= 0) & (found <= 1)).all()


def test_specialisation_from_alike_to_disjoint():
    alike, disjoint = [[8.0, 2.0, 0.0]], [[0.0, 0.0, 5.0]]
    load = torch.tensor([[*alike, *alike], [*alike, *disjoint]], dtype=torch.float64) * 3
    assert specialisation(load).tolist() == pytest.approx([0, 1])
    load[0] *= 100  # a domain's size does not matter
    assert specialisation(load).tolist() == pytest.approx([0, 1])
    nothing = torch.zeros(1, 2, 3, dtype=torch.float64)
    assert specialisation(torch.cat([load, nothing])).tolist() == pytest.approx([0, 1])
    assert specialisation(load[:1]).tolist() == [0, 0]


def test_the_divergence_of_two_loads():
    a = torch.tensor([[4.0, 0.0], [3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 9.0], [3.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    half = (shannon([0.75, 0.25]) - shannon([0.5, 0.5]) / 2) / math.log(2)
    assert divergence(a, b).tolist() == pytest.approx([1, 0, half])
    assert torch.equal(divergence(a, b), divergence(b, a))


def test_the_overlap_of_two_models_choices():
    a = torch.tensor([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    b = torch.tensor([[[1, 0], [2, 0], [1, 3], [1, 3]]])
    valid = torch.tensor([True, True, True, False])
    assert overlap(a, b, valid).tolist() == pytest.approx([(2 + 1 + 0) / 6])
    assert overlap(a, a, valid).tolist() == [1]
    assert overlap(a, b[..., :1], valid).tolist() == pytest.approx([(1 + 1 + 0) / 6])
    assert overlap(a, b, torch.zeros(4, dtype=torch.bool)).tolist() == [0]


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 9))
def test_a_runs_history_computes_the_same_without_torch(seed, domains, experts):
    generator = torch.Generator().manual_seed(seed)
    load = torch.randint(0, 4, (domains, 3, experts), generator=generator).double()
    load[..., 0] += 1  # each layer of each domain has a token
    share = load / load.sum(-1, keepdim=True)
    for layer, ours in enumerate(specialisation(load).tolist()):
        theirs = history.specialisation(share[:, layer].tolist())
        assert theirs == pytest.approx(ours, abs=1e-12)
    for domain in range(domains):
        rounded = [round(value, 4) for value in evenness(load[domain]).tolist()]
        # a tie may fall to either side: one of the last digit
        found = history._entropies(share[domain].tolist())
        assert found == pytest.approx(rounded, abs=1.01e-4)
