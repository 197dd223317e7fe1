"""The learning rate's course: a pure function of the step."""

import math

from expertly.train.config import ScheduleConfig


def lr_factor(step: int, schedule: ScheduleConfig) -> float:
    """What the learning rate is multiplied by at `step`, counted from 0.

    Linear warm-up, then a cosine down to min_lr_ratio, or flat with a linear decay over the last
    decay_ratio of the steps (wsd), or flat.
    """
    warmup = round(schedule.warmup_ratio * schedule.max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.lr_scheduler_type == "constant":
        return 1.0
    floor = schedule.min_lr_ratio
    if schedule.lr_scheduler_type == "wsd":
        decay = max(1, round(schedule.decay_ratio * schedule.max_steps))
        left = min(1.0, (schedule.max_steps - step) / decay)
        return floor + (1 - floor) * left
    done = (step - warmup) / max(1, schedule.max_steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
