"""What does watching cost? The recorder's, the probe's and the alarms' own seconds over a step's.

Run: python benchmarks/watch_cost.py [--steps 30] [key=value ...]
They are timed from inside the demo's own training loop, parts and whole in the same steps.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import expertly.cli
from expertly.config import load
from expertly.models.probe import OutputProbe
from expertly.train import update
from expertly.train.config import TrainConfig
from expertly.train.guard import Guard
from expertly.train.health import Health
from expertly.train.rebalance import Remedy
from expertly.train.setup import prepare
from expertly.watch.alarms import Alarms
from expertly.watch.recorder import Recorder

DEMO = Path(expertly.cli.__file__).with_name("demo.yaml")


class Silent:
    """In place of a run's log."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Say nothing."""

    def say(self, line: str) -> None:
        """Say nothing."""


def timed(call: Callable, name: str, seconds: dict[str, float]) -> Callable:
    """The call, its seconds added up under a name."""

    def wrapped(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            seconds[name] += time.perf_counter() - started

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    config = load(TrainConfig, DEMO, asked.overrides)
    seconds: dict[str, float] = defaultdict(float)
    for owner, method, name in (
        (Recorder, "add", "recorder"),
        (Recorder, "read", "recorder"),
        (OutputProbe, "_look", "output norms"),
        (Alarms, "add", "alarms"),
    ):
        setattr(owner, method, timed(getattr(owner, method), name, seconds))
    update.watch_set = timed(update.watch_set, "watch set", seconds)
    job = prepare(config, None, lambda line: None)
    health, guard = Health(job, config, Remedy()), Guard(config.optim)
    log: Any = Silent()
    for step in range(-3, asked.steps):
        if step == 0:  # the first steps allocate
            seconds.clear()
            started = time.perf_counter()
        health.look(step)
        done = update.train_step(config, job, health.recorder, guard, step + 3)
        assert done.counts is not None, "these are MoE models"
        health.heed(step + 1, done.counts, log)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    whole = time.perf_counter() - started
    print(f"{'step':14}{1e3 * whole / asked.steps:9.2f} ms")
    for name, each in [*seconds.items(), ("watching", sum(seconds.values()))]:
        print(f"{name:14}{1e3 * each / asked.steps:9.2f} ms{each / whole:9.2%}")


if __name__ == "__main__":
    main()
