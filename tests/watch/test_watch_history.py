"""A run's history as a report: from old and new records, thinned, with alarms and domains."""

import copy
import json
import math
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.watch.history import MOST_CELLS, history, specialisation
from expertly.watch.page import page
from expertly.watch.records import METRICS, ROUTER, append_json
from expertly.watch.report import readings

LOAD = [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]]
WATCHED = {"entropy_norm": 0.8, "aux_loss": 2.1, "aux_loss_per_k": 1.05, "worst_layer": 0}


def snapshot(run, step, load=LOAD, **more):
    record = {"step": step, "tokens": 100 * step, "seconds": 1.0, "load": load}
    append_json(run / ROUTER, {**record, **more})


def report(run, **record):
    append_json(run / METRICS, record)


def test_an_old_run_has_loads_only(tmp_path):
    old = {"step": 10, "moe": {"entropy_norm": 0.9, "z_loss": math.nan}}
    (tmp_path / METRICS).write_text(json.dumps(old) + "\n")  # not quite JSON
    snapshot(tmp_path, 10)
    found = history(tmp_path)
    assert found["load"] == [[[2, 2, 0, 0], [1, 1, 1, 1], [2.8, 0.4, 0.4, 0.4]]]
    assert found["series"]["entropy_norm"][0][:2] == [0.5, 1.0]
    assert found["series"]["max_load_ratio"] == [[2.0, 1.0, 2.8]]
    assert set(found["series"]) == {"entropy_norm", "max_load_ratio"}
    assert found["worst"] == [0, 2, 1]
    assert found["names"] == ["layer 0", "layer 1", "layer 2"]
    assert (found["title"], found["family"], found["top_k"]) == (tmp_path.name, "unknown", 0)
    assert (found["norms"], found["domains"], found["drift"]) == (None, None, None)
    assert found["summary"] == {"entropy_norm": 0.9, "z_loss": None}
    json.dumps(found, allow_nan=False)


def test_a_new_run_has_everything(tmp_path):
    report(tmp_path, step=20, moe=WATCHED)
    snapshot(tmp_path, 10)  # before an upgrade: no more than the load
    more = {"router_confidence": [0.3, 0.4, 0.5], "dropped_frac": [0, 0.1, 0], "other": [1, 2, 3]}
    norms = [[2.0, 4.0, 6.0, 0.0], [0, 0, 0, 0], [1.0, 1.0, 1.0, math.nan]]
    snapshot(tmp_path, 20, mass=[*LOAD[:0:-1], [math.nan] * 4], layers=more, norms=norms)
    shares = {"code": LOAD, "docs": [[0.0, 0.0, 0.5, 0.5], LOAD[1], [0.0] * 4]}
    append_json(tmp_path / ROUTER, {"step": 20, "domains": {"code": LOAD}})
    append_json(tmp_path / ROUTER, {"step": 20, "domains": shares})
    found = history(tmp_path)
    assert found["steps"] == [10, 20]
    assert found["tokens"] == 2000
    assert found["top_k"] == 2
    assert found["series"]["router_confidence"] == [None, [0.3, 0.4, 0.5]]
    assert found["series"]["dropped_frac"] == [None, [0, 0.1, 0]]
    assert found["series"]["mass_entropy_norm"][1][1:] == [1.0, 0.0]
    assert found["norms"] == [[0.5, 1.0, 1.5, 0.0], [0, 0, 0, 0], [1.0, 1.0, 1.0, None]]
    assert found["domains"]["names"] == ["code", "docs"]
    assert found["domains"]["load"][1][0] == [0, 0, 2, 2]
    assert found["domains"]["specialisation"] == [1.0, 0.0, 0.0]
    assert str(found["summary"]["worst_layer"]) == "0"
    assert len(page(found)) > 1000


def test_how_alike_experts_are_belongs_to_the_steps_after_an_evaluation(tmp_path):
    def evaluation(step, **cosines):
        means = {name: sum(rows) / 3 for name, rows in cosines.items()}
        report(tmp_path, step=step, eval={"loss": 1.0}, divergence=means)
        append_json(tmp_path / ROUTER, {"step": step, "divergence": cosines, "domains": {}})

    report(tmp_path, step=5, moe=WATCHED)
    for step in (5, 10, 15, 20):
        snapshot(tmp_path, step)
        if step == 10:
            evaluation(10, to_dense=[0.9, 0.8, 0.7])
        if step == 20:
            evaluation(20, to_dense=[0.6, 0.5, 0.4], to_each_other=[0.3, 0.2, 0.1])
    found = history(tmp_path)
    first, last = [0.9, 0.8, 0.7], [0.6, 0.5, 0.4]
    assert found["series"]["cosine_to_dense"] == [None, first, first, last]
    assert found["series"]["cosine_to_each_other"] == [None, None, None, [0.3, 0.2, 0.1]]
    assert found["summary"]["cosine_to_dense"] == pytest.approx(0.5)
    told = {reading.name: reading.now for reading in readings(found["summary"])}
    assert told["like the dense model"] == "0.5000"
    assert told["experts alike (cosine)"] == "0.2000"
    assert len(page(found)) > 1000


def test_a_token_is_never_rounded_away(tmp_path):
    report(tmp_path, step=1)
    snapshot(tmp_path, 1, [[1e-6, 0.0, 1 - 1e-6]])
    assert history(tmp_path)["load"][0][0] == [0.001, 0.0, 3.0]


def test_family_and_names_come_from_the_newest_checkpoint(tmp_path):
    report(tmp_path, step=1)
    snapshot(tmp_path, 1)
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 5, "first_k_dense_replace": 2}
    config |= {
        "n_routed_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 8,
        "n_shared_experts": 1,
    }
    for step, model in ((9, config | {"num_experts_per_tok": 1}), (10, config)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text(json.dumps(model))
    (tmp_path / "checkpoint-11").mkdir()  # nothing in it
    found = history(tmp_path)
    assert (found["family"], found["top_k"]) == ("deepseek_v3", 3)
    assert found["names"] == ["layer 0 (block 2)", "layer 1 (block 3)", "layer 2 (block 4)"]


def test_alarms_end_when_they_are_cleared(tmp_path):
    snapshot(tmp_path, 50)

    def alarm(step, kind, layer):
        words = {"what": "w", "advice": "a", "figure": 1.0, "limit": 2.0, "experts": [1]}
        report(tmp_path, step=step, alarm={"kind": kind, "layer": layer, **words})

    alarm(10, "dead", 1)
    alarm(10, "collapse", 1)
    report(tmp_path, step=20, cleared={"kind": "dead", "layer": 1})
    alarm(30, "dead", 1)
    alarm(40, "dead", 0)
    report(tmp_path, step=50, cleared={"kind": "dead", "layer": 0})
    found = history(tmp_path)
    ends = [(a["kind"], a["layer"], a["step"], a["cleared"]) for a in found["alarms"]]
    assert ends == [
        ("dead", 1, 10, 20),
        ("collapse", 1, 10, None),
        ("dead", 1, 30, None),
        ("dead", 0, 40, 50),
    ]
    assert found["worst"] == [1, 0, 2], "an open alarm goes before an uneven load"


def test_a_long_run_is_thinned_evenly_with_its_ends(tmp_path):
    experts = 5000
    most = MOST_CELLS // experts
    row = [[round(1 / experts, 5)] * experts]
    for step in range(most + 9):
        snapshot(tmp_path, step, row)
    steps = history(tmp_path)["steps"]
    assert len(steps) == most
    assert (steps[0], steps[-1]) == (0, most + 8)
    assert {b - a for a, b in pairwise(steps)} == {1, 2}
    append_json(tmp_path / ROUTER, {"step": 1, "domains": {f"d{n}": row for n in range(40)}})
    assert len(history(tmp_path)["steps"]) == most - 40, "domains are on the same page"


def test_what_is_no_run_or_has_no_router_says_so(tmp_path):
    with pytest.raises(ExpertlyError, match=r"E305.*FIX: name the output_dir"):
        history(tmp_path)
    report(tmp_path, step=1, train={"loss": 1.0})
    with pytest.raises(ExpertlyError, match=r"E303.*router\.jsonl.*FIX: name a run"):
        history(tmp_path)


def test_more_than_half_silent_is_measured_against_those_that_answer(tmp_path):
    snapshot(tmp_path, 1, norms=[[0.0, 0.0, 0.0, 2.0], [0.0] * 4, [1.0, 4.0, 0.0, None]])
    assert history(tmp_path)["norms"] == [[0, 0, 0, 1], [0] * 4, [0.25, 1, 0, None]]


def test_the_config_of_another_model_names_no_layer(tmp_path):
    snapshot(tmp_path, 1)
    (tmp_path / "checkpoint-1").mkdir()
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8}
    config = {"model_type": "mixtral", "num_hidden_layers": 2, **sizes}
    (tmp_path / "checkpoint-1" / "config.json").write_text(json.dumps(config))
    assert history(tmp_path)["names"] == ["layer 0", "layer 1", "layer 2"]


WHOLE = {  # a run's records with everything that a history reads
    METRICS: [
        {"step": 10, "tokens": 9, "train": {"loss": 1.0}, "moe": WATCHED},
        {
            "step": 11,
            "alarm": {
                "kind": "dead",
                "layer": 1,
                "experts": [1],
                "step": 11,
                "figure": 0.0,
                "limit": 0.01,
                "what": "w",
                "advice": "a",
            },
        },
        {"step": 12, "cleared": {"kind": "dead", "layer": 1}},
        {"step": 20, "moe": WATCHED},
        {"step": 20, "eval": {}, "divergence": {"to_dense": 0.9, "to_each_other": None}},
    ],
    ROUTER: [
        {"step": 10, "tokens": 9, "load": LOAD},
        {
            "step": 20,
            "tokens": 99,
            "load": LOAD,
            "mass": LOAD,
            "layers": {"router_confidence": [0.1, 0.2, None], "dropped_frac": [0, 0, 0]},
            "norms": [[1.0, 2.0, None, 0.0]] * 3,
        },
        {
            "step": 20,
            "domains": {"code": LOAD, "docs": LOAD},
            "divergence": {"to_dense": [0.9, None, 1.0], "to_each_other": [0, -0.1, 1]},
        },
    ],
}
STRANGE = [None, True, -1, 0.5, 10**400, math.nan, math.inf, "x", [], [[]], [None], {}, [[[1]]]]


def mutated(value, random):
    """A value with one thing in it, at any depth, replaced, left out or twice there."""
    value = copy.deepcopy(value)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = random.choice(keys)
        if not (isinstance(at[key], dict | list) and at[key] and random.random() < 0.7):
            break
        at = at[key]
    change = random.random()
    if change < 0.25:
        del at[key]
    elif change < 0.4 and isinstance(at, list):
        at.append(at[key])
    else:
        at[key] = random.choice(STRANGE)
    return value


@pytest.mark.parametrize("name", [METRICS, ROUTER])
def test_damaged_records_are_a_report_or_an_error_in_one_line(name, tmp_path):
    random, ends = Random(0), Counter()
    for _ in range(1500):
        records = {**WHOLE, name: mutated(WHOLE[name], random)}
        for file, lines in records.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / file).write_text(text)
        try:
            found = history(tmp_path)
        except ExpertlyError as error:
            ends[error.code] += 1
            assert error.code in ("E301", "E303") and "\n" not in str(error)
            continue
        ends["report"] += 1
        page(found)
        readings(found["summary"])
        assert len(found["names"]) == len(found["load"][-1])
    assert ends["report"] > 100 and ends["E301"] > 100


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=5))
def test_specialisation_is_the_mean_divergence_from_the_mixture(counts):
    loads = [[n / sum(row) for n in row] for row in counts if any(row)]
    found = specialisation(loads)
    assert 0 <= found <= 1
    if len(loads) < 2:
        assert found == 0
        return
    slow = 0.0
    for load in loads:
        for expert, share in enumerate(load):
            mixed = sum(other[expert] for other in loads) / len(loads)
            slow += share * math.log(share / mixed) / len(loads) if share else 0.0
    assert found == pytest.approx(slow / math.log(len(loads)), abs=1e-9)
    assert specialisation([loads[0]] * 3) == pytest.approx(0, abs=1e-9)
