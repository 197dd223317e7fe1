"""Training runs in processes of their own, to be killed.

Imports take most of such a process's life. So a server does them once, and a run is a fork of it
that enters by the command line's only door, with its own signals, limits and exit code. Where the
imports themselves are the matter, `fresh=True` starts an interpreter instead. This file is both
ends: the tests' side, and run as a program the server.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

_PATIENCE = 120.0  # seconds, on a machine that does other things too


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


# --- The other end ------------------------------------------------------------------------------


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
