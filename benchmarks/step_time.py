"""How long is a training step of an MoE against its dense twin's? Interleaved, on real text.

Run: python benchmarks/step_time.py [--rounds 30] [key=value ...], as in model.hidden_size=256.
Both run in one process, step by step in turn, so that a machine whose speed drifts slows both.
"""

import argparse
import statistics
import time
from pathlib import Path

import expertly.cli
from expertly.config import load
from expertly.train.config import TrainConfig
from expertly.train.guard import Guard
from expertly.train.setup import prepare
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder

DEMO = Path(expertly.cli.__file__).with_name("demo.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    jobs = {}
    for name, twin in (("moe", "false"), ("twin", "true")):
        config = load(TrainConfig, asked.config, [*asked.overrides, f"model.twin={twin}"])
        job = prepare(config, None, lambda line: None)
        recorder = Recorder(job.attachment.rule) if job.attachment else None
        jobs[name] = (config, job, recorder)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for step in range(asked.rounds + 3):
        for name, (config, job, recorder) in jobs.items():
            started = time.perf_counter()
            train_step(config, job, recorder, Guard(config.optim), step)
            if step >= 3:  # the first steps allocate
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        print(f"{name:5} median {statistics.median(values):.3f} s, min {min(values):.3f} s a step")
    pairs = [a / b for a, b in zip(seconds["moe"], seconds["twin"], strict=True)]
    print(f"ratio median {statistics.median(pairs):.3f}, of {asked.rounds} pairs")


if __name__ == "__main__":
    main()
