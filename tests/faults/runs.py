"""Tiny training runs to disturb, and what must be on disk afterwards."""

import atexit
import functools
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from server import Server

from expertly import receipts
from expertly.folders import checkpoints, sha256, verify
from expertly.watch.records import METRICS, ROUTER, read_records

STAGES = ("begun", "written", "sealed", "renamed")


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
