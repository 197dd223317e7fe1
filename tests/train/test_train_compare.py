"""Curves made by hand: when is a loss reached, and who is sooner?"""

import pytest

from expertly.errors import ExpertlyError
from expertly.train.compare import Curve, at, chart, compare, reached, read_curve
from expertly.train.log import METRICS, append_json


def write_run(run, points, seconds_per_step=1.0):
    """A run folder with an evaluation at each (step, loss), between other records."""
    run.mkdir(parents=True)
    for step, loss in points:
        where = {"step": step, "tokens": 10 * step, "seconds": step * seconds_per_step}
        append_json(run / METRICS, {**where, "train": {"loss": 99.0}})
        held_out = {"loss": loss, "domain": {"code": loss + 1}}
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
