"""What the benchmarks beside peers share: arguments, rounds in turn, ratios, tables."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).with_name("peers")))
from wire import Answer, Peer

_BANDWIDTH = """
import torch
from expertly.bench.machine import read_bandwidth
torch.set_num_threads({threads})
print(read_bandwidth())
"""


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--peers", type=Path, default=Path(os.environ.get("EXPERTLY_PEERS", "peers")))
    made.add_argument(
        "--only", nargs="*", default=[], help="contenders with one of these in a name"
    )
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", type=Path, help="where to write every figure")
    return made


def python_of(peers: Path, environment: str) -> Path:
    """The interpreter of a peer's environment; that of this process for our own."""
    return peers / environment / "bin/python" if environment else Path(sys.executable)


def start(peers: Path, environment: str, worker: str, threads: int, **options: Any) -> Peer:
    """A contender's process, its model loaded. Raises PeerError."""
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"expertly-{Path(worker).stem}.log"
    options["threads"] = threads
    return Peer(python_of(peers, environment), worker, threads, options, log)


def wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


def read_bandwidth(threads: int) -> float:
    """Bytes/s that so many threads read, measured in a process of its own."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    command = [sys.executable, "-c", _BANDWIDTH.format(threads=threads)]
    return float(subprocess.run(command, env=env, check=True, capture_output=True).stdout)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """How many times as fast we are: the median over rounds, which were timed in turn.

    Both in seconds.
    """
    pairs = [a / b for a, b in zip(theirs, ours, strict=False)]
    return statistics.median(pairs) if pairs else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float | None, form: str = ".1f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def write_json(to: Path | None, found: Any) -> None:
    if to:
        to.write_text(json.dumps(found, indent=1, default=str))


__all__ = ["Answer", "Peer"]
