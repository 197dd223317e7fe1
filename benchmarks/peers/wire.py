"""A contender in a process of its own: one JSON object a line, asked and answered.

The side that answers needs numpy alone, so that it runs in any peer's environment. What libraries
print goes to stderr. A contender that is not asked is stopped (SIGSTOP), so that its threads, which
may spin while they wait, take nothing from the one that is.
"""

import ctypes
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class PeerError(Exception):
    """A contender cannot run; says why in one line."""


class Peer:
    """The asking side: a contender's process, stopped between two questions.

    python: the interpreter of its environment. worker: its file in this folder. threads: how many
    its libraries may use. Raises PeerError when it cannot start.
    """

    def __init__(self, python: Path, worker: str, threads: int, options: Answer, log: Path):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        env = {**os.environ, **limits, "PYTHONDONTWRITEBYTECODE": "1"}
        self.log, self.ended = log, False
        try:
            self.process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name(worker))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("wb"),
                env=env,
                text=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise PeerError(f"not installed ({error.strerror}: {python})") from None
        try:
            self.loaded = self.ask("load", limit=900, options=options)
        except PeerError:
            self.end()
            raise

    def ask(self, do: str, limit: float = 300, **question: Any) -> Answer:
        """One question, its answer. limit: seconds, after which it is ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"do": do, **question}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else None
        if not line:
            why = self._last_words() if line == "" else f"no answer within {limit:.0f} s"
            self.end()
            raise PeerError(why)
        answer = json.loads(line)
        if "failed" in answer:
            raise PeerError(answer["failed"])
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        self.ended = True
        self.process.kill()
        self.process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        code, self.ended = self.process.wait(), True
        return one_line(f"ended with {code}: {lines[-1] if lines else 'no message'}")


def _end_with_parent() -> None:
    """A stopped process would outlive this one: prctl(PR_SET_PDEATHSIG, SIGKILL), on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(engine_of: Callable[..., Any]) -> None:
    """The answering side: load an engine, then do what is asked until stdin ends.

    An engine has what the benchmark asks it to do as methods that answer with a dict; for `round`,
    `greedy` and `save_logits`, set(**setting), prefill(ids), step(id), best() and logits(ids) do.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = None
    for line in sys.stdin:
        question = json.loads(line)
        do = question.pop("do")
        try:
            if do == "load":
                started = time.perf_counter()
                engine = engine_of(**question["options"])
                answer: Answer = {"seconds": time.perf_counter() - started}
                answer["memory"] = peak_memory()
            else:
                answer = {**_deed(engine, do)(**question), "memory": peak_memory()}
        except Exception as error:  # noqa: BLE001  # the benchmark tells it, and goes on
            answer = {"failed": one_line(f"{type(error).__name__}: {error}")}
        print(json.dumps(answer), file=out, flush=True)


def timed_round(engine: Any, tokens: list[int], prompt: int, setting: Answer) -> Answer:
    """Seconds of one prefill and of every decode step after it."""
    engine.set(**setting)
    started = time.perf_counter()
    engine.prefill(tokens[:prompt])
    prefill = time.perf_counter() - started
    steps = []
    for token in tokens[prompt:]:
        started = time.perf_counter()
        engine.step(token)
        steps.append(time.perf_counter() - started)
    return {"prefill": prefill, "decode": sum(steps), "steps": steps}


def saved_logits(engine: Any, tokens: list[int], setting: Answer, to: str) -> Answer:
    """Save the logits at every position of a prompt, (tokens, vocab), for the benchmark to read."""
    import numpy as np

    engine.set(**setting)
    np.save(to, np.asarray(engine.logits(tokens), dtype=np.float32))
    return {}


def greedy(engine: Any, tokens: list[int], new: int, setting: Answer) -> Answer:
    """The most likely tokens after a prompt, one at a time; the end of a text does not end it."""
    engine.set(**setting)
    engine.prefill(tokens)
    found = [engine.best()]
    while len(found) < new:
        engine.step(found[-1])
        found.append(engine.best())
    return {"tokens": found}


def about(engine: Any, package: str) -> Answer:
    """The version of a package, and which of our own modules this process has."""
    ours = [name for name in sys.modules if name.partition(".")[0] == "expertly"]
    return {"version": metadata.version(package), "ours": ours}


def _deed(engine: Any, do: str) -> Callable[..., Answer]:
    """What is asked: a method of the engine's own, or what all do in the same way."""
    shared: dict[str, Callable[..., Answer]] = {
        "round": timed_round,
        "save_logits": saved_logits,
        "greedy": greedy,
        "about": about,
    }
    own = getattr(engine, do, None)
    return own or partial(shared[do], engine)


def peak_memory() -> int:
    """Bytes that this process had in memory at most, mapped files among them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:200]
