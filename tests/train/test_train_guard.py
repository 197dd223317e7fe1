"""The guard: what is no number never enters its window, a jump is found, ordinary losses pass."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_models import Log

from expertly.errors import ExpertlyError
from expertly.train.checkpoint import Progress
from expertly.train.config import OptimConfig
from expertly.train.guard import GoBack, Guard, refuse

BAD = st.sampled_from([math.nan, math.inf, -math.inf])
GOOD = st.floats(0.01, 20) | st.sampled_from([1e200, 1.7e308])


def at(step: int, drawn: dict | None) -> Progress:
    data = {} if drawn is None else {"drawn": drawn}
    return Progress(step=step, tokens=0, seconds=0.0, data=data)


# --- The window -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(GOOD | BAD, GOOD | BAD), max_size=60), st.floats(0, 8))
def test_what_is_no_number_is_refused_and_never_enters(steps, sigmas):
    guard = Guard(OptimConfig(spike_sigmas=sigmas))
    for loss, norm in steps:
        verdict = guard.judge(loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            assert verdict is not None
            assert verdict.code == "E501"
            assert guard.state()["bad"] > 0
    assert all(map(math.isfinite, guard.state()["losses"]))
    json.dumps(guard.state(), allow_nan=False)


@given(st.integers(0, 2**32), st.floats(0.5, 12), st.floats(0, 0.1), st.integers(20, 300))
@settings(max_examples=30)
def test_a_tenfold_loss_is_found_behind_any_plateau(seed, level, noise, steps):
    draw, guard = random.Random(seed), Guard(OptimConfig())
    for _ in range(steps):
        assert guard.judge(level * (1 + draw.uniform(-noise, noise)), 1.0) is None
    window = guard.state()["losses"]
    assert guard.judge(10 * level, 1.0).code == "E502"
    assert guard.state()["losses"] == window
    assert guard.judge(level, 1.0) is None, "the one behind it is not its victim"


@given(st.floats(4, 12), st.floats(0.5, 3), st.integers(5, 2000), st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_falling_loss_is_never_a_jump(high, low, pace, seed):
    """Smooth, and with noise of a twentieth."""
    draw, guard = random.Random(seed), Guard(OptimConfig())
    for noise in (0, 0.05):
        for step in range(400):
            loss = low + (high - low) * math.exp(-step / pace)
            assert guard.judge(loss * (1 + draw.gauss(0, noise)), 1.0) is None
        guard = Guard(OptimConfig())


@given(st.integers(0, 2**32), st.floats(0.02, 10), st.floats(0, 0.3))
@settings(max_examples=30)
def test_a_noisy_plateau_is_never_a_jump(seed, level, noise):
    draw, guard = random.Random(seed), Guard(OptimConfig())
    for _ in range(400):
        assert guard.judge(level * (1 + draw.uniform(-noise, noise)), 1.0) is None


def test_with_few_losses_a_jump_cannot_be_told():
    guard = Guard(OptimConfig())
    assert all(guard.judge(1.0, 1.0) is None for _ in range(19))
    assert guard.judge(50.0, 1.0) is None
    assert Guard(OptimConfig(spike_sigmas=0), {"losses": [1.0] * 99}).judge(50.0, 1.0) is None
    assert Guard(OptimConfig(), {"losses": [1.0] * 20}).judge(50.0, 1.0) is not None


@given(st.lists(GOOD | BAD, max_size=80), st.integers(0, 80))
def test_a_cut_anywhere_changes_no_verdict(losses, where):
    whole = Guard(OptimConfig())
    expected = [whole.judge(loss, 1.0) for loss in losses]
    first = Guard(OptimConfig())
    found = [first.judge(loss, 1.0) for loss in losses[:where]]
    second = Guard(OptimConfig(), json.loads(json.dumps(first.state())))
    found += [second.judge(loss, 1.0) for loss in losses[where:]]
    assert found == expected
    assert second.state() == whole.state()


def test_a_window_can_be_forgotten():
    guard = Guard(OptimConfig(), {"losses": [1.0] * 128, "bad": 2})
    guard.forget()
    assert guard.state() == {"losses": [], "bad": 0}
    assert guard.judge(50.0, 1.0) is None


def test_the_window_has_an_end():
    guard = Guard(OptimConfig())
    for step in range(500):
        guard.judge(1 + step / 1e6, 1.0)
    assert guard.state()["losses"] == [1 + step / 1e6 for step in range(372, 500)]


# --- Giving up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_bad_steps_in_a_row_are_counted(allowed):
    guard = Guard(OptimConfig(max_bad_steps=allowed))
    for _ in range(3):
        for number in range(1, allowed + 2):
            guard.judge(math.nan, 1.0)
            assert guard.gives_up() == (number > allowed)
        guard.judge(1.0, 1.0)  # a good one between them


def test_ways_back_are_counted_until_a_checkpoint():
    config = OptimConfig(max_bad_steps=2, on_bad_step="roll_back")
    guard = Guard(config)
    before = guard.state()
    for _ in range(3):
        for tries in range(3):
            guard.judge(1.0, 1.0)
            guard.judge(math.nan, 1.0)
            assert guard.gives_up() == (tries == 2), "though good steps lie between them"
            guard = GoBack({}, [{}] * (tries + 1)).guard(config, before)
            assert guard.state() == before
        guard.saved()


def test_stop_means_at_once():
    guard = Guard(OptimConfig(on_bad_step="stop"))
    guard.judge(math.nan, 1.0)
    assert guard.gives_up()


# --- What follows ---------------------------------------------------------------------------------


def bad_step(**optim):
    config, log = OptimConfig(**optim), Log()
    guard = Guard(config)
    verdict = guard.judge(math.inf, 2.0)
    before, after = at(6, {"a": 8, "b": 3}), at(7, {"a": 12, "b": 3})
    return refuse(config, guard, log, before, after, verdict), log


def test_skipped():
    back, log = bad_step(on_bad_step="skip")
    why = "loss inf, gradient norm 2.0"
    assert back is None
    assert log.records == [{"step": 7, "skipped": {"loss": why, "rows": {"a": [8, 12]}}}]
    assert log.lines == [f"warning: step 7: {why}; the batch is skipped, rows {{'a': [8, 12]}}"]


def test_rolled_back():
    back, log = bad_step(on_bad_step="roll_back")
    assert isinstance(back, GoBack)
    assert back.data == {"drawn": {"a": 12, "b": 3}}, "behind the batch"
    assert [(each["from"], each["rows"]) for each in back.records] == [(7, {"a": [8, 12]})]
    assert log.records == [], "the loop writes it, behind what it takes back"
    assert "going back to the newest checkpoint" in log.lines[0]


@pytest.mark.parametrize(
    ("optim", "fix"),
    [
        ({"on_bad_step": "stop"}, "go on with --resume optim.on_bad_step=skip (or roll_back)"),
        ({"max_bad_steps": 0}, "start a new run with a lower optim.learning_rate"),
    ],
)
def test_refused(optim, fix):
    with pytest.raises(ExpertlyError) as caught:
        bad_step(**optim)
    assert (caught.value.code, caught.value.exit_code) == ("E501", 5)
    assert f"E501] step 7: loss inf, gradient norm 2.0; no update was made. FIX: {fix}" in str(
        caught.value
    )


def test_the_rows_of_the_first_batch():
    config, log = OptimConfig(), Log()
    guard = Guard(config)
    refuse(config, guard, log, at(0, None), at(1, {"a": 4}), guard.judge(math.nan, 1.0))
    assert log.records[0]["skipped"]["rows"] == {"a": [0, 4]}
