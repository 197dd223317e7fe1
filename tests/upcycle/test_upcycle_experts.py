"""One expert's matrix: copies, slices, units anew, noise."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.upcycle.experts import MATRICES, Change, Place, expert_matrix

FF, DIM = 96, 40
DENSE = [
    torch.randn(shape, generator=torch.Generator().manual_seed(i)) * (0.5 + i) + 0.1 * i
    for i, shape in enumerate([(FF, DIM), (FF, DIM), (DIM, FF)])
]


def expert(change, number=0, layer=0, dense=DENSE):
    """Its gate, up and down; down as (ff, dim), so that a unit is a row of each."""
    gate, up, down = (
        expert_matrix(dense[i], change, Place(layer, number, i)) for i in range(len(MATRICES))
    )
    return [gate, up, down.T]


def kept(change, number=0, layer=0):
    """Which units of gate, up and down are the dense model's: (3, width)."""
    width = FF // change.slices
    start = number % change.slices * width
    wanted = expert(Change(slices=change.slices), number)
    made = expert(change, number, layer)
    assert all(each.shape == (width, DIM) for each in made), start
    return torch.stack([(a == b).all(dim=1) for a, b in zip(made, wanted, strict=True)])


def glu(matrices, x):
    gate, up, down = matrices
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down


# --- Copies and slices -------------------------------------------------------------------------


def test_a_copy_is_exact():
    for made, dense in zip(expert(Change(), 5), [*DENSE[:2], DENSE[2].T], strict=True):
        assert torch.equal(made, dense)


@settings(max_examples=40)
@given(
    slices=st.sampled_from([1, 2, 3, 4, 6, 8, 96]),
    copies=st.integers(1, 3),
    share=st.sampled_from([0.5, 1.0]),
)
def test_slices_tile_the_dense_matrix_and_their_mean_is_its_function(slices, copies, share):
    change = Change(slices=slices, share=share)
    experts = [expert(change, number) for number in range(slices * copies)]
    for copy in range(copies):
        ours = experts[copy * slices : (copy + 1) * slices]
        gate, up, down = (torch.cat([each[i] for each in ours]) for i in range(3))
        assert torch.equal(gate, DENSE[0])
        assert torch.equal(up, DENSE[1])
        torch.testing.assert_close(down, DENSE[2].T * (slices * share))
    x = torch.randn(5, DIM, generator=torch.Generator().manual_seed(9))
    mean = sum(glu(each, x) for each in experts[:slices]) / slices  # as renormalised top-k does
    wanted = share * glu([*DENSE[:2], DENSE[2].T], x)
    torch.testing.assert_close(mean, wanted, atol=1e-2, rtol=1e-4)


def test_what_is_made_is_float32_and_the_dense_matrix_stays():
    before = [each.clone() for each in DENSE]
    half = [each.bfloat16() for each in DENSE]
    every = Change(slices=2, drop=0.5, noise=0.5, share=0.5)
    assert all(each.dtype == torch.float32 for each in expert(every, dense=half))
    expert(every)
    assert all(map(torch.equal, before, DENSE))
    plain = expert(Change(), dense=half)
    assert all(torch.equal(made, each.float()) for made, each in zip(plain[:2], half, strict=False))


@pytest.mark.parametrize("slices", [1, 2, 8])
@pytest.mark.parametrize("change", [{}, {"drop": 0.5, "noise": 0.1}], ids=["plain", "changed"])
def test_a_slice_that_is_cut_first_is_that_of_the_converted_matrix(slices, change):
    half = [each.bfloat16() for each in DENSE]
    change = Change(slices=slices, **change)
    for number in (0, slices - 1):
        converted = expert(change, number, dense=[each.float() for each in half])
        assert all(map(torch.equal, expert(change, number, dense=half), converted))


# --- Drop-Upcycling ----------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 2])
def test_half_of_the_units_of_every_expert_begin_anew_the_same_in_all_three(slices):
    sets = []
    for number in range(4):
        same = kept(Change(slices=slices, drop=0.5), number)
        assert same.sum(dim=1).tolist() == [FF // slices // 2] * 3
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        sets.append(tuple(same[0].tolist()))
    assert len(set(sets)) == 4, "each expert loses others"


def test_units_that_are_dropped_apart_differ_by_matrix():
    """So at 0.5 about 1 / 8 of the units keep all three vectors."""
    shares = []
    for number in range(40):
        same = kept(Change(drop=0.5, drop_apart=True), number)
        assert same.sum(dim=1).tolist() == [FF // 2] * 3
        assert not torch.equal(same[0], same[1])
        shares.append(same.all(dim=0).float().mean())
    assert 0.1 < sum(shares) / 40 < 0.15


@pytest.mark.parametrize("apart", [False, True])
def test_nothing_of_the_dense_model_is_left_at_1_but_its_moments(apart):
    change = Change(drop=1.0, drop_apart=apart)
    for made, dense in zip(expert(change), [*DENSE[:2], DENSE[2].T], strict=True):
        assert not (made == dense).any()
        assert float(made.mean()) == pytest.approx(float(dense.mean()), abs=0.15)
        assert float(made.std()) == pytest.approx(float(dense.std()), rel=0.05)


def test_moments_are_those_of_the_units_that_go():
    """A slice of another spread gives its own: nothing leaks over from the rest of the matrix."""
    dense = [each.clone() for each in DENSE]
    dense[0][FF // 2 :] *= 100
    dense[0][FF // 2 :] += 1000
    first, second = (expert(Change(slices=2, drop=1.0), i, dense=dense)[0] for i in range(2))
    assert float(first.std()) == pytest.approx(float(DENSE[0].std()), rel=0.1)
    assert float(second.mean()) == pytest.approx(1000, rel=0.05)


@settings(max_examples=30)
@given(drop=st.floats(0, 1), number=st.integers(0, 7), seed=st.integers(0, 2**63 - 1))
@pytest.mark.filterwarnings("error")
def test_so_many_units_go_as_were_asked_for(drop, number, seed):
    same = kept(Change(slices=2, drop=drop, seed=seed), number)
    assert (~same).sum(dim=1).tolist() == [round(drop * FF / 2)] * 3


# --- Noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_noise_is_a_share_of_the_matrices_own_deviation(noise):
    for made, dense in zip(expert(Change(noise=noise)), [*DENSE[:2], DENSE[2].T], strict=True):
        added = made - dense
        assert float(added.std() / dense.std()) == pytest.approx(noise, rel=0.05)
        assert abs(float(added.mean())) < 4 * float(added.std()) / added.numel() ** 0.5


# --- Draws -------------------------------------------------------------------------------------


def test_every_draw_hangs_on_seed_layer_and_expert_alone():
    change = Change(drop=0.5, drop_apart=True, noise=0.1)
    places = [Place(*each) for each in itertools.product(range(2), range(3), range(3))]
    forth = {place: expert_matrix(DENSE[place.matrix], change, place) for place in places}
    torch.manual_seed(5)  # and not on anybody's own draws
    back = {place: expert_matrix(DENSE[place.matrix], change, place) for place in places[::-1]}
    assert all(torch.equal(forth[place], back[place]) for place in places)
    by_matrix = [[forth[place] for place in places if place.matrix == i] for i in range(3)]
    for made in by_matrix:
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(made, 2))
    other = expert_matrix(DENSE[0], Change(drop=0.5, drop_apart=True, noise=0.1, seed=1), places[0])
    assert not torch.equal(other, forth[places[0]])


def test_the_callers_own_draws_go_on_as_if_nothing_was():
    torch.manual_seed(1)
    wanted = torch.randn(3)
    torch.manual_seed(1)
    expert(Change(drop=0.5, noise=0.1))
    assert torch.equal(torch.randn(3), wanted)
