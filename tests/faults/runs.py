"""Training runs in processes of their own, to be killed, and what must be on disk afterwards.

Imports take most of such a process's life. So a server does them once, and a run is a fork of it
that enters by the command line's only door, with its own signals, limits and exit code. Where the
imports themselves are the matter, `fresh=True` starts an interpreter instead.
"""

import atexit
import functools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from expertly import receipts
from expertly.folders import checkpoints, sha256, verify
from expertly.watch.records import METRICS, ROUTER, read_records

STAGES = ("begun", "written", "sealed", "renamed")
_PATIENCE = 120.0  # seconds, on a machine that does other things too


def write_config(folder: Path, cache: Path) -> Path:
    """Text of two domains, and a run of 24 steps on it in which random numbers matter."""
    draw = random.Random(0)
    words = ["the", "a", "red", "green", "cat", "dog", "sees", "hears", "and", "or", "tree"]
    for name, count in (("words", 4000), ("words_held_out", 330)):
        (folder / f"{name}.txt").write_text(" ".join(draw.choice(words) for _ in range(count)))
    for name, count in (("digits", 1500), ("digits_held_out", 150)):
        sums = (f"{a}+{b}={a + b};" for a, b in ((draw.randrange(50),) * 2 for _ in range(count)))
        (folder / f"{name}.txt").write_text("".join(sums))
    file = folder / "run.yaml"
    file.write_text(
        f"""\
output_dir: {folder / "unused"}
model:
  family: qwen3_moe
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  num_experts: 4
  num_experts_per_tok: 2
  moe_intermediate_size: 32
  expert_dropout: 0.1
  extra: {{head_dim: 8}}
data:
  sources:
    - {{path: {folder / "words.txt"}}}
    - {{path: {folder / "digits.txt"}}}
    - {{path: {folder / "words_held_out.txt"}, domain: words, eval: true}}
    - {{path: {folder / "digits_held_out.txt"}, domain: digits, eval: true}}
  eval_fraction: 0
  sequence_length: 32
  vocab_size: 300
  eval_tokens: 500
  cache_dir: {cache}
router: {{jitter: 0.05}}
optim: {{learning_rate: 3e-3}}
schedule: {{max_steps: 24, per_device_train_batch_size: 4}}
eval: {{eval_steps: 6}}
log: {{logging_steps: 1, save_steps: 3}}
"""
    )
    return file


class Server:
    """Starts runs; leave() at the end."""

    def __init__(self, logs: Path):
        self._logs, self._runs = logs, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(
        self,
        config: Path,
        run: Path,
        *overrides: str,
        fault: str = "",
        resume: bool = True,
        fresh: bool = False,
        limits: dict[str, int] | None = None,
        reader: bool = True,
    ) -> "Started":
        """Start `expertly train`. limits: by names of `resource`; RLIMIT_AS counts from what a
        process has at the start. reader: whether anybody reads its stderr."""
        self._runs += 1
        log = self._logs / str(self._runs)
        argv = ["train", str(config), f"output_dir={run}", *overrides]
        order = {
            "argv": [*argv, "--resume"] if resume else argv,
            "env": {"EXPERTLY_FAULT": fault},
            "log": str(log),
            "limits": limits or {},
            "reader": reader,
            "fresh": fresh,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Started(log)

    def leave(self) -> None:
        """End the server."""
        self._process.communicate()


class Started:
    """A run's process."""

    def __init__(self, log: Path):
        self._log = log
        self.pid = int(self._wait_for(".pid"))

    def said(self) -> str:
        """Its stderr so far."""
        return self._log.with_suffix(".err").read_text()

    def result(self) -> str:
        """Its stdout so far."""
        return self._log.with_suffix(".out").read_text()

    def send(self, signum: int) -> None:
        """A signal, unless it is over."""
        if not self._log.with_suffix(".code").exists():
            os.kill(self.pid, signum)

    def code(self) -> int:
        """How it ended; below 0: by that signal."""
        return int(self._wait_for(".code"))

    def over(self) -> bool:
        """Whether it has ended."""
        return self._log.with_suffix(".code").exists()

    def until(self, text: str) -> None:
        """Wait until it has said so, or is over."""
        end = time.monotonic() + _PATIENCE
        while text not in self.said() and not self.over():
            assert time.monotonic() < end, self.said()
            time.sleep(0.0005)

    def _wait_for(self, suffix: str) -> str:
        end = time.monotonic() + _PATIENCE
        file = self._log.with_suffix(suffix)
        while not file.exists():
            assert time.monotonic() < end, f"no {file}"
            time.sleep(0.001)
        return file.read_text()


class Place(NamedTuple):
    """What the tests of a session share."""

    server: Server
    config: Path
    unbroken: Path  # the folder of a run that nothing happened to
    seconds: float  # that it took


@functools.cache  # the files of this folder share one, and its imports
def place() -> Place:
    """A server, a config for it and its unbroken run."""
    folder = Path(tempfile.mkdtemp(prefix="expertly-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "logs").mkdir()
    config, server = write_config(folder, folder / "cache"), Server(folder / "logs")
    atexit.register(server.leave)
    for name in ("warm-up", "unbroken"):  # the first one also trains the tokenizer
        began = time.monotonic()
        process = server.start(config, folder / name, resume=False)
        assert process.code() == 0, process.said()
    return Place(server, config, folder / "unbroken", time.monotonic() - began)


# --- What must be on disk -----------------------------------------------------------------------


def announced(said: str) -> list[int]:
    """The steps that a run called saved."""
    return [int(step) for step in re.findall(r"^saved step (\d+): ", said, re.MULTILINE)]


def require_nothing_lost(run: Path, steps: Iterable[int]) -> None:
    """Every announced checkpoint, and every other one that is visible, is whole and loads."""
    from safetensors.torch import load_file

    from expertly.models.loading import open_model
    from expertly.train.checkpoint import read_progress

    there = {int(path.name.split("-")[1]): path for path in checkpoints(run)}
    assert set(steps) <= there.keys(), "a checkpoint was announced and is lost"
    for step, path in there.items():
        assert verify(path, hashes=True)
        assert read_progress(path).step == step
        for file in path.rglob("*.safetensors"):
            load_file(file)
    if there:
        open_model(there[max(there)])
    read_records(run / METRICS)


def hidden(run: Path) -> list[str]:
    """What saves that were never finished left in a folder."""
    return [path.name for path in run.iterdir() if path.name.endswith(".tmp")]


def contents(checkpoint: Path) -> dict[str, object]:
    """All of a checkpoint without the clock's numbers."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    plain = {path.relative_to(checkpoint).as_posix(): sha256(path) for path in files}
    progress = json.loads((checkpoint / "expertly/progress.json").read_text())
    del progress["seconds"], plain["MANIFEST.json"]
    return {**plain, "expertly/progress.json": progress}


def told(run: Path, file: str = METRICS) -> list[dict]:
    """A run's records without the clock's numbers."""
    records = read_records(run / file)
    for record in records:
        record.pop("seconds", None)
        record.get("train", {}).pop("tokens_per_second", None)
    return records


def require_same(run: Path, unbroken: Path) -> None:
    """A run ended as the unbroken one did, to the bit."""
    ours, theirs = checkpoints(run)[-1], checkpoints(unbroken)[-1]
    assert ours.name == theirs.name
    assert contents(ours) == contents(theirs)
    for file in (METRICS, ROUTER):
        assert told(run, file) == told(unbroken, file)
    mine, other = receipts.read(run), receipts.read(unbroken)
    assert (mine.checks, mine.changed, mine.figures) == (other.checks, other.changed, other.figures)
    assert hidden(run) == []


# --- The server ---------------------------------------------------------------------------------


def _serve() -> None:
    """Fork a run for every line of stdin, and a keeper for each that writes down how it ended."""
    import torch

    import expertly.cli.train
    import expertly.train.loop  # noqa: F401

    torch.set_num_threads(1)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        keeper = os.fork()
        if not keeper:
            _keep(order)
            return
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _keep(order: dict) -> None:
    for suffix in (".err", ".out"):
        Path(order["log"]).with_suffix(suffix).touch()
    pid = os.fork()
    if not pid:
        _run(order)
        return
    log = Path(order["log"])
    _put(log.with_suffix(".pid"), pid)
    _put(log.with_suffix(".code"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _put(file: Path, number: int) -> None:
    file.with_suffix(".part").write_text(str(number))
    file.with_suffix(".part").rename(file)


def _run(order: dict) -> None:
    log = Path(order["log"])
    error = os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_APPEND)
    output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_APPEND)
    if not order["reader"]:
        reader, error = os.pipe()
        os.close(reader)
    for target, handle in enumerate((os.open(os.devnull, os.O_RDONLY), output, error)):
        os.dup2(handle, target)
    os.environ.update(order["env"])
    for name, limit in order["limits"].items():
        if name == "RLIMIT_AS":
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                "SC_PAGESIZE"
            )
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if order["fresh"]:
        os.execv(sys.executable, [sys.executable, "-m", "expertly", *order["argv"]])
    sys.argv = ["expertly", *order["argv"]]
    from expertly.__main__ import main

    main()


if __name__ == "__main__":
    _serve()
