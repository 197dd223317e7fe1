"""One way to time: the fastest of several rounds, which had the machine most to itself."""

import time
from collections.abc import Callable


def best_time(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
