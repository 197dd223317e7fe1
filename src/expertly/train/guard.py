"""The guard before each update: a loss that is no number, or one that jumped, moves no weight.

What to do about it is `optim.on_bad_step`: skip the batch, roll back to the newest checkpoint and
go on behind the batch (PaLM, section 5.1), or stop. The window of losses is part of a checkpoint,
and what is not finite never enters it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from expertly.errors import ExpertlyError
from expertly.train.checkpoint import Progress
from expertly.train.config import OptimConfig
from expertly.train.log import RunLog

_WINDOW = 128  # losses that a new one is held against, as in OLMo
_LEAST = 20  # with fewer a jump cannot be told from the start of training
_FLOOR = 0.1  # of the mean: on a plateau a small batch of another mixture is many deviations away


_DOES = {"skip": "the batch is skipped", "roll_back": "going back to the newest checkpoint"}


class Verdict(NamedTuple):
    """What is wrong with a step, and the error code should it end the run."""

    code: str
    why: str


class Guard:
    """Judges losses and gradients; state() and the constructor carry it through a checkpoint."""

    def __init__(self, config: OptimConfig, state: Mapping[str, Any] | None = None):
        self._config = config
        kept: dict[str, Any] = {"losses": [], "bad": 0} | dict(state or {})
        self._losses: list[float] = list(kept["losses"])
        self._bad: int = kept["bad"]  # bad steps without a good one between them
        self._rollbacks: list[dict[str, Any]] = []  # records of those since the newest checkpoint

    def judge(self, loss: float, grad_norm: float) -> Verdict | None:
        """None for a step that may update; then its loss enters the window."""
        verdict = self._verdict(loss, grad_norm)
        if verdict is None:
            self._losses = [*self._losses, loss][-_WINDOW:]
            self._bad = 0
        else:
            self._bad += 1
        return verdict

    def gives_up(self) -> bool:
        """Whether a run should end after the bad step just judged."""
        tried = max(self._bad, len(self._rollbacks) + 1)
        return self._config.on_bad_step == "stop" or tried > self._config.max_bad_steps

    def forget(self) -> None:
        """Begin the window anew: a router that was drawn anew makes the loss jump, and rightly."""
        self._losses, self._bad = [], 0

    def saved(self) -> None:
        """A checkpoint was reached: what was rolled back before it is overcome."""
        self._rollbacks = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able."""
        return {"losses": self._losses, "bad": self._bad}

    def _verdict(self, loss: float, grad_norm: float) -> Verdict | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict("E501", f"loss {loss}, gradient norm {grad_norm}")
        limit = self._limit()
        if loss > limit:
            return Verdict("E502", f"loss {loss:.3f}, above {limit:.3f}")
        return None

    def _limit(self) -> float:
        """The highest loss that is no jump."""
        sigmas = self._config.spike_sigmas
        if not sigmas or len(self._losses) < _LEAST:
            return math.inf
        count = len(self._losses)
        mean = sum(self._losses) / count
        # statistics.pstdev takes half a millisecond, and squares overflow
        deviation = math.dist(self._losses, [mean] * count) / math.sqrt(count)
        return mean + sigmas * max(deviation, _FLOOR * abs(mean))


class GoBack(NamedTuple):
    """A run's wish to go on from its newest checkpoint, behind the data that it has seen."""

    data: dict[str, Any]
    records: list[dict[str, Any]]  # for metrics.jsonl: of each since the newest checkpoint

    def guard(self, config: OptimConfig, state: Mapping[str, Any]) -> Guard:
        """The guard to go on with: the checkpoint's, but it knows how often the run went back."""
        guard = Guard(config, state)
        guard._rollbacks = self.records
        return guard


def refuse(
    config: OptimConfig, guard: Guard, log: RunLog, before: Progress, at: Progress, bad: Verdict
) -> GoBack | None:
    """What happens about a batch that moved no weight; None: the run goes on behind it.

    before, at: where the run stood before and after it. Raises E501 or E502 when it was one too
    many.
    """
    record = {"loss": bad.why, "rows": _rows(before.data, at.data)}
    what = f"step {at.step}"
    if guard.gives_up():
        why = f"{bad.why}; no update was made"
        fix = "start a new run with a lower optim.learning_rate"
        if config.on_bad_step == "stop":
            fix = "go on with --resume optim.on_bad_step=skip (or roll_back)"
        raise ExpertlyError(bad.code, what, why, fix=fix)
    log.say(f"warning: {what}: {bad.why}; {_DOES[config.on_bad_step]}, rows {record['rows']}")
    if config.on_bad_step == "roll_back":
        return GoBack(at.data, [*guard._rollbacks, {"from": at.step, **record}])
    log.metrics({"step": at.step, "skipped": record})
    return None


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[int]]:
    """Which rows of each domain a batch was made of: [first, behind the last] in their order."""
    drawn = before.get("drawn", {})
    rows = {name: [drawn.get(name, 0), end] for name, end in after["drawn"].items()}
    return {name: ends for name, ends in rows.items() if ends[0] < ends[1]}
