"""Router rows: what they prefer on states that they have not seen, and what prompts cannot say."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertly.upcycle.rows import fitted_rows, random_rows, unclear

DIM = 48


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kind(index, tokens, *, dim=DIM, apart=1.0, seed=0):
    """States (tokens, dim) of one kind of text, as an RMSNorm gives them: one mean direction."""
    mean, own = 3 * normal(dim, seed=1), apart * normal(dim, seed=100 + index)
    x = mean + own + normal(tokens, dim, seed=1000 + 10 * seed + index)
    return x * x.square().mean(dim=1, keepdim=True).rsqrt()


def task(sizes, **keys):
    """States of as many kinds as sizes, and that each kind wants its own copy."""
    states = torch.cat([kind(index, size, **keys) for index, size in enumerate(sizes)])
    return states, torch.eye(len(sizes)).repeat_interleave(torch.tensor(sizes), dim=0)


def own_first(rows, copies, **keys):
    """By copy the share of new tokens of its kind that rank it first."""
    new = [kind(index, 500, seed=7, **keys) @ rows.T for index in range(copies)]
    return [float((logits.argmax(1) == copy).float().mean()) for copy, logits in enumerate(new)]


def spread(rows, states):
    logits = states.double() @ rows.double().T
    return float((logits - logits.mean(dim=1, keepdim=True)).std(correction=0))


def test_random_rows_are_small_and_of_the_seed():
    rows = random_rows(8, 4096, seed=3)
    assert rows.shape == (8, 4096) and rows.dtype == torch.float32
    assert float(rows.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(rows.mean())) < 5e-4
    assert rows.equal(random_rows(8, 4096, seed=3))
    assert not rows.equal(random_rows(8, 4096, seed=4))
    torch.testing.assert_close(random_rows(8, 4096, seed=3, std=0.2), 10 * rows)


def test_random_rows_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    random_rows(2, 4, seed=1)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("copies", [2, 3, 8])
def test_new_states_of_a_kind_rank_their_copy_first(copies):
    states, wanted = task([100] * copies)
    rows = fitted_rows(states, wanted)
    assert rows.shape == (copies, DIM) and rows.dtype == torch.float32
    assert min(own_first(rows, copies)) > 0.9
    assert unclear(rows, states, wanted) == []


def test_fewer_tokens_than_dimensions_are_enough():
    rows = fitted_rows(*task([40, 40], dim=256))
    assert min(own_first(rows, 2, dim=256)) > 0.9


def test_a_copy_with_few_tokens_is_not_drowned_out():
    rows = fitted_rows(*task([100, 2000], apart=0.4))
    assert min(own_first(rows, 2, apart=0.4)) > 0.8


def test_what_is_said_twice_weighs_as_if_said_once():
    states, wanted = task([60, 80, 50])
    again = torch.cat([states, states[:60]]), torch.cat([wanted, wanted[:60]])
    once, twice = fitted_rows(states, wanted), fitted_rows(*again)
    torch.testing.assert_close(once / once.norm(), twice / twice.norm())


def test_unmarked_tokens_say_nothing():
    states, wanted = task([60, 60])
    more = torch.cat([states, kind(5, 200)]), torch.cat([wanted, torch.zeros(200, 2)])
    plain, rows = fitted_rows(states, wanted), fitted_rows(*more)
    torch.testing.assert_close(rows / rows.norm(), plain / plain.norm())


def test_unwanted_tokens_go_elsewhere():
    states = torch.cat([kind(index, 100) for index in (0, 1, 2)])
    wanted = torch.zeros(300, 2)
    wanted[:100, 0], wanted[100:200, 1], wanted[200:, 0] = 1, 1, -1
    rows = fitted_rows(states, wanted)
    assert float(((kind(2, 500, seed=7) @ rows.T).argmax(1) == 1).float().mean()) > 0.9
    assert min(own_first(rows, 2)) > 0.9


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_logits_spread_by_one(scale):
    states, wanted = task([90, 110, 40])
    rows = fitted_rows(scale * states, wanted)
    assert spread(rows, scale * states) == pytest.approx(1.0, rel=1e-4)


def test_they_are_the_ridge_regression_of_a_longer_way():
    states, wanted = task([30, 30, 30])
    x, y = states.double(), wanted.double() - 1 / 3
    ridge = 0.1 * x.square().sum(dim=0).mean()
    stacked = torch.cat([x, ridge.sqrt() * torch.eye(DIM, dtype=torch.double)])
    zeros = torch.zeros(DIM, 3, dtype=torch.double)
    longer = torch.linalg.lstsq(stacked, torch.cat([y, zeros])).solution.T
    rows = fitted_rows(states, wanted).double()
    torch.testing.assert_close(rows / rows.norm(), longer / longer.norm(), atol=1e-6, rtol=1e-5)


@given(shift=st.floats(-3, 3), seed=st.integers(0, 2**31), copies=st.integers(2, 6))
def test_a_common_vector_changes_no_routing(shift, seed, copies):
    states, wanted = task([20] * copies)
    rows = fitted_rows(states, wanted).double()
    moved = rows + shift * normal(DIM, seed=seed).double()
    before, after = states.double() @ rows.T, states.double() @ moved.T
    torch.testing.assert_close(before.softmax(dim=1), after.softmax(dim=1))
    top = before.topk(2, dim=1).values
    sure = top[:, 0] - top[:, 1] > 1e-9
    assert before.argmax(dim=1)[sure].equal(after.argmax(dim=1)[sure])


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
    distinct=st.integers(1, 12),
)
def test_rows_are_finite_and_at_most_of_spread_one(sizes, seed, scale, distinct):
    tokens = sum(sizes)
    states = scale * normal(distinct, 7, seed=seed)[torch.arange(tokens) % distinct]
    wanted = torch.eye(len(sizes)).repeat_interleave(torch.tensor(sizes), dim=0)
    rows = fitted_rows(states, wanted)
    assert rows.isfinite().all()
    assert spread(rows, states) < 1.001


@pytest.mark.parametrize("sizes", [[50, 50], [3, 97], [7, 7, 7]])
def test_equal_states_give_no_rows(sizes):
    _, wanted = task(sizes)
    states = kind(0, 1).expand(len(wanted), DIM)
    assert fitted_rows(states, wanted).eq(0).all()


@pytest.mark.parametrize("copies", [2, 3, 5, 6, 7])
def test_identical_prompts_give_no_rows_and_are_named(copies):
    """Rounding differs from copy to copy; it must not be scaled up to a preference."""
    states = kind(0, 50).repeat(copies, 1)
    wanted = torch.eye(copies).repeat_interleave(50, dim=0)
    rows = fitted_rows(states, wanted)
    assert rows.eq(0).all()
    assert len(unclear(rows, states, wanted)) >= copies - 1


def test_prompts_of_two_copies_alike_name_one_of_them_and_not_the_third():
    states = torch.cat([kind(0, 60), kind(1, 60), kind(0, 60)])
    wanted = torch.eye(3).repeat_interleave(60, dim=0)
    found = unclear(fitted_rows(states, wanted), states, wanted)
    assert found and set(found) <= {0, 2}


def test_a_copy_without_tokens_is_unclear():
    states, wanted = task([50, 50])
    wanted = torch.cat([wanted, torch.zeros(100, 1)], dim=1)
    assert unclear(fitted_rows(states, wanted), states, wanted) == [2]


def test_a_real_size_is_quick():
    states, wanted = normal(4096, 576), torch.eye(16).repeat(256, 1)
    start = time.process_time()
    fitted_rows(states, wanted)
    assert time.process_time() - start < 10  # about one, and room for a slow machine


@pytest.mark.parametrize("chunk", [1, 7, 90, 4096])
def test_how_many_tokens_are_in_float64_at_once_does_not_matter(chunk, monkeypatch):
    states, wanted = task([30, 50, 10])
    whole = fitted_rows(states, wanted)
    monkeypatch.setattr("expertly.upcycle.rows._CHUNK", chunk)
    torch.testing.assert_close(fitted_rows(states, wanted), whole, atol=1e-6, rtol=1e-5)
