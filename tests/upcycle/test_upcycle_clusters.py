"""Balanced clusters: even sizes whatever the states, and planted kinds found."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.upcycle.clusters import _assign, balanced_clusters


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(tokens, copies, dim=32, *, seed=0):
    """States (tokens, dim) of several kinds around a large common direction, and their kinds."""
    kinds = torch.arange(tokens) % copies
    centres = 2 * normal(copies, dim, seed=seed + 1)
    return 10 * normal(dim, seed=seed) + centres[kinds] + normal(tokens, dim, seed=seed + 2), kinds


def cost(states, labels):
    """The sum of squared distances to the clusters' means."""
    means = [states[labels == label].mean(dim=0) for label in labels.unique()]
    parts = [states[labels == label] for label in labels.unique()]
    return sum(float((part - mean).square().sum()) for part, mean in zip(parts, means, strict=True))


def slowly_assigned(costs):
    """Each token in turn, those with most to lose first, to the cheapest cluster with room."""
    rows = costs.tolist()
    least, spare = divmod(len(rows), len(rows[0]))
    sizes, labels = [0] * len(rows[0]), [0] * len(rows)
    regret = [sorted(row)[1] - sorted(row)[0] for row in rows]
    for token in sorted(range(len(rows)), key=lambda token: -regret[token]):
        larger = sum(size > least for size in sizes)
        limit = [least + 1 if larger < spare else least] * len(sizes)
        room = [c for c in range(len(sizes)) if sizes[c] < limit[c]]
        labels[token] = min(room, key=lambda cluster: rows[token][cluster])
        sizes[labels[token]] += 1
    return torch.tensor(labels)


@pytest.mark.parametrize("copies", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_planted_kinds_are_found(copies, seed):
    states, kinds = planted(60 * copies, copies, seed=seed)
    labels = balanced_clusters(states, copies, seed=seed)
    for kind in range(copies):
        assert labels[kinds == kind].bincount().max() >= 0.9 * 60


@given(
    tokens=st.integers(1, 60),
    copies=st.integers(1, 9),
    dim=st.integers(1, 5),
    distinct=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
def test_sizes_are_even(tokens, copies, dim, distinct, seed):
    if tokens < copies:
        tokens += copies
    states = normal(distinct, dim, seed=seed)[torch.arange(tokens) % distinct]
    labels = balanced_clusters(states, copies, seed=seed)
    sizes = labels.bincount(minlength=copies)
    assert labels.shape == (tokens,) and labels.dtype == torch.long
    assert len(sizes) == copies and sizes.max() - sizes.min() <= 1


@given(tokens=st.integers(2, 40), copies=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_the_assignment_is_the_slow_one(tokens, copies, seed):
    costs = normal(max(tokens, copies), copies, seed=seed).square()
    assert _assign(costs).equal(slowly_assigned(costs))


def test_the_same_for_the_same_seed():
    states = normal(200, 16)
    labels = balanced_clusters(states, 4, seed=3)
    assert labels.equal(balanced_clusters(states, 4, seed=3))
    assert not labels.equal(balanced_clusters(states, 4, seed=4))


def test_the_states_stay_as_they_are():
    states = normal(50, 8)
    before = states.clone()
    balanced_clusters(states, 4, seed=0)
    assert states.equal(before)


def test_one_point_many_times():
    sizes = balanced_clusters(torch.full((101, 8), 3.0), 4, seed=0).bincount()
    assert sorted(sizes.tolist()) == [25, 25, 25, 26]


def test_rounds_help_an_even_split_by_chance():
    states, _ = planted(400, 4)
    chance = cost(states, torch.randperm(400, generator=torch.Generator().manual_seed(0)) % 4)
    assert cost(states, balanced_clusters(states, 4, seed=0)) < 0.5 * chance


def test_a_common_vector_changes_nothing():
    states, _ = planted(400, 4)
    moved = balanced_clusters(states + 5.0, 4, seed=0)
    assert moved.equal(balanced_clusters(states, 4, seed=0))


def test_half_precision_is_taken():
    states, kinds = planted(120, 2)
    labels = balanced_clusters(states.bfloat16(), 2, seed=0)
    assert labels[kinds == 0].bincount().max() >= 54


def test_fewer_tokens_than_clusters_is_one_line():
    with pytest.raises(ExpertlyError) as error:
        balanced_clusters(normal(3, 8), 4, seed=0)
    assert error.value.code == "E202"
    assert "\n" not in str(error.value)
    assert "3, fewer than 4 clusters" in str(error.value)


def test_a_real_size_is_quick():
    start = time.process_time()
    balanced_clusters(normal(8192, 576), 16, seed=0)
    assert time.process_time() - start < 10  # about one, and room for a slow machine
