"""The learning rate's course against its closed forms."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.train.config import ScheduleConfig
from expertly.train.schedule import lr_factor


def course(**given) -> list[float]:
    schedule = ScheduleConfig(**given)
    return [lr_factor(step, schedule) for step in range(schedule.max_steps)]


def test_warm_up_is_linear_and_never_0():
    factors = course(max_steps=100, warmup_ratio=0.1, lr_scheduler_type="constant")
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10:] == [1.0] * 90


def test_cosine():
    factors = course(max_steps=100, warmup_ratio=0.1, min_lr_ratio=0.2)
    after = [0.2 + 0.8 * (1 + math.cos(math.pi * at / 90)) / 2 for at in range(90)]
    assert factors[10:] == pytest.approx(after)
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.6), "half of the way down"


def test_wsd_is_flat_and_then_falls_in_a_line():
    wsd = {"lr_scheduler_type": "wsd", "warmup_ratio": 0, "decay_ratio": 0.2, "min_lr_ratio": 0.1}
    factors = course(max_steps=100, **wsd)
    assert factors[:81] == [1.0] * 81
    assert factors[80:] == pytest.approx([1 - 0.9 * at / 20 for at in range(20)])


def test_without_decay_wsd_is_constant():
    assert set(course(lr_scheduler_type="wsd", decay_ratio=0, warmup_ratio=0)) == {1.0}


ratios = st.floats(0, 1)
schedules = st.builds(
    ScheduleConfig,
    max_steps=st.integers(1, 200),
    lr_scheduler_type=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup_ratio=ratios,
    decay_ratio=ratios,
    min_lr_ratio=ratios,
).filter(lambda schedule: not list(schedule.problems()))


@given(schedules)
def test_any_course_stays_in_bounds_and_makes_no_jump(schedule):
    factors = [lr_factor(step, schedule) for step in range(schedule.max_steps)]
    assert all(0 < factor <= 1 or schedule.min_lr_ratio == 0 <= factor for factor in factors)
    warmup = round(schedule.warmup_ratio * schedule.max_steps)
    decay = {
        "constant": schedule.max_steps,
        "wsd": max(1, round(schedule.decay_ratio * schedule.max_steps)),
        "cosine": max(1, schedule.max_steps - warmup) * 2 / math.pi,
    }[schedule.lr_scheduler_type]
    steepest = max(1 / (warmup + 1), 1 / decay) + 1e-9
    jumps = [abs(b - a) for a, b in itertools.pairwise(factors)]
    assert max(jumps, default=0) <= steepest


@given(schedules)
def test_it_rises_while_warming_up_and_never_again(schedule):
    factors = [lr_factor(step, schedule) for step in range(schedule.max_steps)]
    warmup = round(schedule.warmup_ratio * schedule.max_steps)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
