"""Curves made by hand: when is a loss reached, and who is sooner?"""

import pytest

from expertly.errors import ExpertlyError
from expertly.receipts import RECEIPT, Receipt, write
from expertly.train.compare import (
    Curve,
    at,
    chart,
    compare,
    differences_of,
    reached,
    read_curve,
)
from expertly.watch.records import METRICS, append_json


def write_run(run, points, seconds_per_step=1.0, tokens=10, domain="code"):
    """A run folder with an evaluation at each (step, loss), between other records."""
    run.mkdir(parents=True)
    for step, loss in points:
        where = {"step": step, "tokens": tokens * step, "seconds": step * seconds_per_step}
        append_json(run / METRICS, {**where, "train": {"loss": 99.0}})
        held_out = {"loss": loss, "domain": {domain: loss + 1}}
        append_json(run / METRICS, {**where, "eval": held_out})
    return run


def curve(*points, name="run") -> Curve:
    steps, losses = zip(*points, strict=True)
    seconds = [step / 2 for step in steps]
    return Curve(name, [*steps], seconds, [*losses], [step * 10 for step in steps], {})


@pytest.mark.parametrize(
    ("loss", "step"),
    [
        pytest.param(9.0, 0, id="from the start"),
        pytest.param(4.0, 10, id="at an evaluation"),
        pytest.param(6.0, 5, id="halfway"),
        pytest.param(3.5, 15, id="in the second part"),
        pytest.param(3.0, 20, id="at the end"),
        pytest.param(2.9, None, id="never"),
    ],
)
def test_reached_interpolates_and_never_guesses(loss, step):
    when = reached(curve((0, 8.0), (10, 4.0), (20, 3.0)), loss)
    assert when == (None if step is None else (step, step / 2))


def test_the_first_time_counts():
    assert reached(curve((0, 8.0), (10, 4.0), (20, 7.0), (30, 2.0)), 4.0) == (10, 5)


def test_ratios(tmp_path):
    a = write_run(tmp_path / "a", [(0, 8), (10, 4), (20, 2)], seconds_per_step=3)
    b = write_run(tmp_path / "b", [(0, 8), (40, 4)])
    first, second, (race, other) = compare(a, b)
    assert (first.name, second.name) == ("a", "b")
    assert first.tokens_per_second == pytest.approx(10 / 3)
    assert first.domains == {"code": 3}
    assert race.loss == 4, "b's final loss"
    assert (race.a, race.b) == ((10, 30), (40, 40))
    assert race.step_ratio == 4
    assert race.time_ratio == pytest.approx(4 / 3)
    assert other.loss == 2
    assert (other.a, other.b) == ((20, 60), None)
    assert other.step_ratio is None
    assert other.time_ratio is None


def test_equal_final_losses_are_one_race(tmp_path):
    a, b = (write_run(tmp_path / name, [(0, 8), (10, 4)]) for name in "ab")
    assert len(compare(a, b)[2]) == 1


def test_a_loss_that_both_start_with_has_no_ratio(tmp_path):
    a, b = (write_run(tmp_path / name, [(0, 8), (10, 4)]) for name in "ab")
    (race,) = compare(a, b, loss=8)[2]
    assert race.a == race.b == (0, 0)
    assert race.step_ratio is None
    assert race.time_ratio is None


def test_one_name_in_two_folders(tmp_path):
    a, b = (write_run(tmp_path / name / "moe", [(0, 8), (10, 4)]) for name in "ab")
    assert [each.name for each in compare(a, b)[:2]] == [str(a), str(b)]


def test_neither_reaches_it(tmp_path):
    a, b = (write_run(tmp_path / name, [(0, 8), (10, 4)]) for name in "ab")
    with pytest.raises(ExpertlyError, match=r"E102.*the best is 4\.0000") as caught:
        compare(a, b, loss=3.9)
    assert caught.value.exit_code == 1


def test_no_evaluation(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "train": {"loss": 1}}\n')
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ExpertlyError, match=r"E301.*no evaluation"):
            read_curve(folder)


POINTS = [(0, 8), (10, 4)]
INPUTS = {
    "data": {"tokens": {"code": "1", "docs": "2"}, "sequence_length": 32},
    "held_out": {"eval_tokens": 500, "sha256": {"code": "3", "docs": "4"}},
    "machine": {"device": "cpu", "threads": 2},
}


def with_receipt(run, **inputs):
    write(Receipt("train", {**INPUTS, **inputs}, {}, {}, (), {}), run)
    return run


def test_runs_that_can_be_compared(tmp_path):
    a, b = (write_run(tmp_path / name, POINTS) for name in "ab")
    assert differences_of(a, b) == []
    with_receipt(a)
    assert differences_of(a, b) == [], "one receipt alone says nothing"
    with_receipt(b)
    assert differences_of(a, b) == []
    with_receipt(b, held_out={}, machine=None, data={"tokens": {}})
    assert differences_of(a, b) == [], "nor does one of an older release"


def test_differences_that_the_curves_show(tmp_path):
    a = write_run(tmp_path / "a", POINTS)
    b = write_run(tmp_path / "b", POINTS, tokens=20, domain="docs")
    assert differences_of(a, b) == [
        "other held-out domains: code against docs",
        "other tokens per step: 10 against 20",
    ]
    unstepped = write_run(tmp_path / "c", POINTS[:1], tokens=20)
    assert differences_of(a, unstepped) == []


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (
            {"held_out": {"eval_tokens": 500, "sha256": {"code": "3", "docs": "5"}}},
            "other held-out text or tokenizer in docs",
        ),
        (
            {"data": {"tokens": {"code": "9", "docs": "9"}, "sequence_length": 32}},
            "other training text or tokenizer in code, docs",
        ),
        (
            {"data": {**INPUTS["data"], "sequence_length": 64}},
            "other data.sequence_length: 32 against 64",
        ),
        (
            {"held_out": {**INPUTS["held_out"], "eval_tokens": 9}},
            "other data.eval_tokens: 500 against 9",
        ),
        (
            {"machine": {"device": "NVIDIA H200", "threads": 2}},
            "other devices, so their seconds differ: cpu against NVIDIA H200",
        ),
        (
            {"machine": {"device": "cpu", "threads": 8}},
            "other numbers of threads, so their seconds differ: 2 against 8",
        ),
    ],
)
def test_differences_that_the_receipts_show(tmp_path, inputs, line):
    a, b = (write_run(tmp_path / name, POINTS) for name in "ab")
    with_receipt(a)
    with_receipt(b, **inputs)
    assert differences_of(a, b) == [line]


def test_differences_with_a_damaged_receipt(tmp_path):
    a, b = (with_receipt(write_run(tmp_path / name, POINTS)) for name in "ab")
    (b / RECEIPT).write_text("{")
    with pytest.raises(ExpertlyError, match=r"E301.*receipt\.json"):
        differences_of(a, b)


@pytest.mark.parametrize(
    ("second", "loss"), [(0, 8), (2.5, 6), (5, 4), (7.5, 3.5), (10, 3), (99, 3), (-1, 8)]
)
def test_at(second, loss):
    assert at(curve((0, 8.0), (10, 4.0), (20, 3.0)), second) == loss


def test_chart_draws_both_and_fits_its_width():
    a = curve((0, 8.0), (10, 4.0), (100, 3.0), name="moe")
    b = curve((0, 8.0), (10, 6.0), (60, 5.0), name="twin")
    picture = chart([a, b], width=40, height=10)
    head, *rows, floor, axis = picture.split("\n")
    assert head.endswith("● moe   ○ twin")
    assert len(rows) == 10
    assert all(len(line) <= 40 + 8 for line in picture.split("\n"))
    assert all(line[7] == "┤" for line in rows)
    drawn = [line[8:].ljust(40) for line in rows]
    assert rows[-1].startswith(" 3.000")
    assert drawn[-1].rstrip().endswith("●"), "the lower curve ends in the corner"
    columns = {mark: [i for i in range(40) if any(r[i] == mark for r in drawn)] for mark in "●○"}
    assert max(columns["●"]) == 39
    assert max(columns["○"]) == 23, "a curve is not drawn beyond its end"
    assert floor.count("─") == 40
    assert axis.rstrip().endswith("50 s of training")


def test_chart_of_runs_that_never_stepped():
    assert "●" in chart([curve((0, 8.0), name="a"), curve((0, 8.0), name="b")])
