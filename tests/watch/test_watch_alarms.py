"""Alarms on made-up loads: each kind begins soon, once, says where, and ends; health is silent."""

import math
import re
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from expertly.train.config import OptimConfig, RouterConfig
from expertly.watch.alarms import WINDOW, Alarms, collapse
from expertly.watch.history import _over_median
from expertly.watch.kinds import KINDS
from expertly.watch.stats import LayerCounts

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 400


def step_counts(share=None, *, layer=1, seed=0, served=1.0, confidence=0.3, tokens=TOKENS):
    """Random counts of one step, even but for one layer: its share per expert of the assignments,
    the part of them that is served, and its router's confidence.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    for index in range(LAYERS):
        odds = torch.ones(EXPERTS) if share is None or index != layer else torch.tensor(share)
        if tokens:
            drawn = torch.multinomial(odds, tokens * TOP_K, replacement=True, generator=generator)
            chosen[index] = drawn.bincount(minlength=EXPERTS)
    load = chosen.clone()
    load[layer] *= served
    sure = torch.full((LAYERS,), 0.3, dtype=torch.float64)
    sure[layer] = confidence
    empty = torch.zeros(LAYERS, dtype=torch.float64)
    return LayerCounts(
        load, chosen, load, sure * tokens, empty, chosen, torch.full_like(empty, tokens)
    )


def ordinary_norms():
    return torch.tensor([1.0, 2.0, 0.5, 1.5, 0.2, 5.0, 1.0, 0.7]).repeat(LAYERS, 1)


def silenced():
    norms = ordinary_norms()
    norms[1, 4] = 0.001
    return norms


HOT = [0.5] + [0.5 / 7] * 7  # of two experts per token one is always the same
SICK = {
    "collapse": [({"share": [0.46, 0.5] + [0.04 / 6] * 6}, [0, 1]), ({"share": HOT}, [0])],
    "dead": [({"share": [1.0] * 5 + [0.0] + [1.0] * 2}, [5])],
    "silent": [({}, [4])],
    "overflow": [({"served": 0.6}, [])],
    "saturation": [({"confidence": 0.99}, [])],
}


@pytest.mark.parametrize("onset", [0, 120])
@pytest.mark.parametrize(
    ("kind", "fields", "experts"),
    [(kind, fields, experts) for kind, cases in SICK.items() for fields, experts in cases],
)
def test_an_alarm_begins_within_50_steps_once_and_ends(kind, fields, experts, onset):
    alarms = Alarms(LAYERS, EXPERTS, TOP_K)
    norms = silenced() if kind == "silent" else ordinary_norms()
    raised, cleared = [], []
    for step in range(1, onset + 121):
        ill = onset < step <= onset + 60
        counts = step_counts(**(fields if ill else {}), seed=step)
        looked = (norms if ill else ordinary_norms()) if step % 10 == 0 else None
        changes = alarms.add(step, counts, looked)
        raised += changes.raised
        cleared += [(step, *ended) for ended in changes.cleared]
        assert [each.step for each in alarms.open] == [each.step for each in raised[len(cleared) :]]
    (alarm,) = raised
    assert (alarm.kind, alarm.layer, alarm.experts) == (kind, 1, experts)
    assert onset < alarm.step <= onset + 50
    ((ended, *which),) = cleared
    assert which == [kind, 1] and onset + 60 < ended <= onset + 110
    assert alarm.limit == KINDS[kind].limit
    assert "layer 1" in alarm.what and all(str(expert) in alarm.what for expert in experts)


def test_advice_names_keys_that_a_run_has_and_says_them_in_words_too():
    sections = {"router": RouterConfig, "optim": OptimConfig}
    for kind in KINDS.values():
        keys = re.findall(r"\b(router|optim)\.(\w+)(?:=(\w+))?", kind.advice)
        assert keys, kind
        for section, leaf, value in keys:
            field = sections[section].__dataclass_fields__[leaf]
            assert not value or value in get_args(field.type)
        # in brackets, so that the sentence is true of a model that no run of ours trains
        assert not re.search(r"\w+\.\w+", re.sub(r"\([^()]*\)", "", kind.advice))


@pytest.mark.parametrize("tokens", [2, 40, 4000])
def test_uneven_but_healthy_loads_raise_nothing(tokens):
    generator = torch.Generator().manual_seed(1)
    odds = torch.distributions.Dirichlet(torch.full((EXPERTS,), 4.0))
    torch.manual_seed(0)
    alarms = Alarms(LAYERS, EXPERTS, TOP_K)
    for step in range(1, 200):
        if step % 20 == 1:
            share = odds.sample().tolist()
        norms = ordinary_norms() * torch.rand(LAYERS, EXPERTS, generator=generator).add(0.5)
        norms[torch.rand(LAYERS, EXPERTS, generator=generator) < 0.3] = math.nan
        changes = alarms.add(step, step_counts(share, seed=step, tokens=tokens), norms)
        assert changes == ([], []), step


def test_a_figure_that_wavers_about_the_limit_is_one_alarm():
    alarms = Alarms(LAYERS, EXPERTS, TOP_K)
    changes = [
        alarms.add(step, step_counts(confidence=0.93 if step // 20 % 2 else 0.97))
        for step in range(1, 200)
    ]
    assert sum(len(each.raised) for each in changes) == 1
    assert not any(each.cleared for each in changes)


def test_in_a_collapse_the_dead_are_not_told_again():
    alarms = Alarms(LAYERS, EXPERTS, TOP_K)
    for step in range(1, 101):
        alarms.add(step, step_counts([0.5, 0.5] + [0.0] * 6, seed=step))
    assert [alarm.kind for alarm in alarms.open] == ["collapse"]
    assert alarms.open[0].figure == pytest.approx(1, abs=0.06)  # chance
    for step in range(101, 200):
        alarms.add(step, step_counts([1.0] * 5 + [0.0] * 3, seed=step))
    assert [(alarm.kind, alarm.experts) for alarm in alarms.open] == [("dead", [5, 6, 7])]


def test_a_checkpoint_goes_on_as_if_nothing_had_been():
    sick = [step_counts(HOT, seed=step, confidence=0.99, served=0.5) for step in range(60)]
    through, before = Alarms(LAYERS, EXPERTS, TOP_K), Alarms(LAYERS, EXPERTS, TOP_K)
    sizes = {name: value.shape for name, value in before.state().items()}
    for step, counts in enumerate(sick[:30]):
        assert through.add(step, counts, silenced()) == before.add(step, counts, silenced())
    state = load(save(before.state()))
    assert {name: value.shape for name, value in state.items()} == sizes, "it does not grow"
    after = Alarms(LAYERS, EXPERTS, TOP_K)
    after.restore(state)
    assert after.open == through.open != []
    for step, counts in enumerate(sick[30:]):
        assert through.add(step, counts) == after.add(step, counts)
    assert after.open == through.open
    before.restore(through.state())
    assert before.open == through.open


def test_an_expert_is_not_dead_by_chance():
    for tokens, found in ((4, []), (8, ["dead"])):  # an even share of 48 or 96 assignments
        alarms = Alarms(LAYERS, EXPERTS, TOP_K)
        for step in range(1, 60):
            alarms.add(step, step_counts([1.0] * 7 + [0.0], seed=step, tokens=tokens))
        assert [alarm.kind for alarm in alarms.open] == found


def test_a_reset_layer_is_seen_afresh():
    alarms = Alarms(LAYERS, EXPERTS, TOP_K)
    both = [0.5, 0.5] + [0.0] * 6
    for step in range(1, 60):
        counts = step_counts(both, layer=1, seed=step)
        counts.chosen[0] = counts.chosen[1]
        alarms.add(step, counts)
    assert [alarm.layer for alarm in alarms.open] == [0, 1]
    assert alarms.reset([1]) == [("collapse", 1)]
    assert [alarm.layer for alarm in alarms.open] == [0]
    changes = [alarms.add(step, step_counts(both, seed=step)) for step in range(60, 60 + WINDOW)]
    again = [alarm for each in changes for alarm in each.raised]
    assert [(alarm.kind, alarm.layer) for alarm in again] == [("collapse", 1)]
    assert again[0].step > 60 + 10, "not by what was seen before"


def test_the_audit_of_a_model_judges_at_once():
    alarms = Alarms(LAYERS, EXPERTS, TOP_K, window=1)
    changes = alarms.add(1, step_counts(HOT, confidence=0.99, served=0.5), silenced())
    kinds = {(alarm.kind, alarm.layer) for alarm in changes.raised}
    assert kinds == {("collapse", 1), ("overflow", 1), ("saturation", 1)}, "4 is not ordinary here"
    assert alarms.add(2, step_counts(), silenced()).raised[0].experts == [4]


def test_no_tokens_and_no_choice_say_nothing():
    alarms = Alarms(LAYERS, EXPERTS, TOP_K)
    for step in range(100):
        assert alarms.add(step, step_counts(tokens=0)) == ([], [])
    everyone = Alarms(LAYERS, EXPERTS, EXPERTS)
    for step in range(100):
        assert everyone.add(step, step_counts()) == ([], [])
    certain = Alarms(LAYERS, EXPERTS, 1)
    for step in range(100):
        assert certain.add(step, step_counts(confidence=0.999)) == ([], [])


def random_counts(num_experts, top_k, tokens, seed):
    """One layer's counts of tokens routed at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    load = chosen.flatten().bincount(minlength=num_experts).double().unsqueeze(0)
    none = torch.zeros(1, dtype=torch.float64)
    return LayerCounts(load, load, load, none, none, load, none + tokens)


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (8, 2), (8, 4), (4, 2), (2, 1)])
def test_few_tokens_are_no_collapse(num_experts, top_k):
    looked = 0
    for tokens in (1, 2, 3, 4, 8, 16, 48, 64):
        for seed in range(40):
            alarms = Alarms(1, num_experts, top_k, window=1)
            counts = random_counts(num_experts, top_k, tokens, seed)
            looked += float(collapse(counts.chosen, top_k)) > KINDS["collapse"].limit
            assert alarms.add(1, counts).raised == []
    assert looked, "by the figure alone some of them were"


@pytest.mark.parametrize(("tokens", "found"), [(95, []), (96, ["collapse"])])
def test_a_collapse_is_told_from_24_assignments_per_expert_on(tokens, found):
    one = torch.zeros(1, EXPERTS, dtype=torch.float64)
    one[0, :TOP_K] = tokens
    none = torch.zeros(1, dtype=torch.float64)
    counts = LayerCounts(one, one, one, none, none, one, none + tokens)
    raised = Alarms(1, EXPERTS, TOP_K, window=1).add(1, counts).raised
    assert [alarm.kind for alarm in raised] == found


@pytest.mark.parametrize("silent", [1, 4, 5, 7, 8])
def test_the_silent_are_found_however_many(silent):
    alarms = Alarms(LAYERS, EXPERTS, TOP_K, window=1)
    norms = ordinary_norms()
    norms[1, :silent] = 0
    (alarm,) = alarms.add(1, step_counts(), norms).raised
    assert (alarm.kind, alarm.layer, alarm.experts) == ("silent", 1, list(range(silent)))
    assert alarm.figure == 0
    assert alarms.add(2, step_counts(), ordinary_norms()).cleared == [("silent", 1)]


@given(st.lists(st.sampled_from([0.0, 1e-4, 0.009, 0.011, 0.5, 1.0, 3.0]), min_size=8, max_size=8))
def test_the_page_calls_silent_what_the_alarm_does(row):
    norms = torch.tensor([row, row, row], dtype=torch.float64)
    even = torch.full((LAYERS, EXPERTS), 100.0, dtype=torch.float64)
    counts = step_counts()._replace(load=even, chosen=even)
    raised = Alarms(LAYERS, EXPERTS, TOP_K, window=1).add(1, counts, norms).raised
    told = next((each.experts for each in raised if each.kind == "silent"), [])
    assert told == [expert for expert, norm in enumerate(_over_median([row])[0]) if norm < 0.01]


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(4, 12))
def test_the_collapse_figure_lies_between_even_and_collapsed(seed, top_k, experts):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack(
        [
            torch.rand(30, experts, generator=generator)
            .topk(top_k)
            .indices.flatten()
            .bincount(minlength=experts),
            torch.full((experts,), 7),
            torch.arange(experts) < top_k,
        ]
    ).double()
    some, even, one = collapse(chosen, top_k).tolist()
    assert even == pytest.approx(0, abs=1e-9)
    assert one == pytest.approx(1 if top_k < experts else 0)
    assert -1e-9 <= some <= 1 + 1e-9


def test_one_expert_of_several_that_gets_every_token_is_a_collapse():
    for top_k in (1, 2, 3, 4):
        chosen = torch.full((1, EXPERTS), 100.0 * (top_k - 1) / (EXPERTS - 1))
        chosen[0, 3] = 100
        assert collapse(chosen.double(), top_k).item() == pytest.approx(1)


def test_a_sentence_names_a_few_of_many_experts():
    alarms = Alarms(1, 20, 2, window=1)
    chosen = torch.tensor([[100.0] * 11 + [0.0] * 9], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    counts = LayerCounts(chosen, chosen, chosen, one, one, chosen, 0 * one + 550.0)
    (alarm,) = [each for each in alarms.add(0, counts).raised if each.kind == "dead"]
    assert len(alarm.experts) == 9
    assert alarm.what.startswith("layer 0, experts 11, 12, 13, 14, 15, 16, 17, 18 and 1 more: ")
