"""Upcycle, read from top to bottom: set up, route, write, prove."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from expertly.errors import ExpertlyError
from expertly.folders import save_folder
from expertly.memory import peak_memory, size
from expertly.models.build import parameters, write_config
from expertly.models.shards import write_shards
from expertly.models.tokenizer import save_tokenizer
from expertly.receipts import Receipt, write
from expertly.upcycle.config import UpcycleConfig
from expertly.upcycle.layout import Part, parts, values
from expertly.upcycle.proof import prove, receipt_of
from expertly.upcycle.room import require_room
from expertly.upcycle.router import router_rows
from expertly.upcycle.setup import Job, prepare
from expertly.upcycle.text import text_rows

Say = Callable[[str], None]  # one line for the user

_EVERY = 10.0  # seconds between two lines of progress
_GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class UpcycleResult:
    """What was made."""

    folder: Path
    target: str
    moe_layers: int
    num_experts: int
    slices: int
    top_k: int
    parameters: int
    active_parameters: int
    bytes: int
    largest_logit_difference: float
    exact: bool  # whether it had to be none
    perplexity: dict[str, float]  # dense, moe: on held-out text
    seconds: float
    peak_bytes: int


def run(config: UpcycleConfig, say: Say) -> UpcycleResult:
    """Make an MoE folder of a dense one, and prove it; all of config.output_dir, or nothing.

    Raises E101 when the proof fails, E205 for a folder in the way, E401 and E402 when disk or
    memory end, and what setup.prepare raises.
    """
    started = time.perf_counter()
    job = prepare(config)
    made = parts(job)
    total = sum(part.entry.nbytes for part in made)
    say(
        f"{job.target.name}: {job.num_experts} experts in {len(job.moe_layers)} layers, top "
        f"{job.top_k}, {size(total)}"
    )
    require_room(Path(config.output_dir), total)
    held_out = text_rows(job, config.tokens, held_out=True)
    rows = router_rows(job, say)
    receipts: list[Receipt] = []

    def fill(folder: Path) -> None:
        _write(job, made, rows, folder, say)
        receipts.append(_proven(job, folder, held_out, started, say))

    folder = save_folder(Path(config.output_dir), fill, need=total)
    return _result(job, folder, receipts[0])


def _write(job: Job, made: list[Part], rows: dict[int, Tensor], folder: Path, say: Say) -> None:
    """The model's files."""
    streams = _telling(values(job, made, rows), made, say)
    write_shards(folder, [part.entry for part in made], streams)
    write_config(job.shape, folder)
    save_tokenizer(job.tokenizer, folder)
    generation = job.dense.folder / _GENERATION
    if generation.is_file():
        shutil.copyfile(generation, folder / _GENERATION)


def _telling(
    streams: Iterator[Iterator[Tensor]], made: list[Part], say: Say
) -> Iterator[Iterator[Tensor]]:
    """The same streams, with a line on how far they are once in a while."""
    last, done = time.monotonic(), 0
    total = sum(part.entry.nbytes for part in made)
    for part, stream in zip(made, streams, strict=True):
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            say(f"writing: {size(done)} of {size(total)}")
        yield stream
        done += part.entry.nbytes


def _proven(job: Job, folder: Path, held_out: Tensor, started: float, say: Say) -> Receipt:
    """Prove it, write the receipt beside the weights, and raise E101 for a check that failed."""
    say(f"proof: both models on {held_out.numel():,} held-out tokens, in float32")
    proof = prove(job, folder, held_out)
    cost = {
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_memory(),
    }
    receipt = receipt_of(job, proof, parameters(job.shape), cost)
    write(receipt, folder)
    for check in receipt.checks:
        if not check.passed:
            why = f"failed with {check.figure}, limit {check.limit}; nothing was written"
            raise ExpertlyError("E101", check.name, why, fix="report it with the model's name")
    return receipt


def _result(job: Job, folder: Path, receipt: Receipt) -> UpcycleResult:
    figures = receipt.figures
    return UpcycleResult(
        folder=folder,
        target=job.target.name,
        moe_layers=len(job.moe_layers),
        num_experts=job.num_experts,
        slices=job.change.slices,
        top_k=job.top_k,
        parameters=figures["parameters"],
        active_parameters=figures["active_parameters"],
        bytes=figures["bytes"],
        largest_logit_difference=figures["largest_logit_difference"],
        exact=job.exact,
        perplexity=figures["perplexity"],
        seconds=figures["seconds"],
        peak_bytes=figures["peak_bytes"],
    )
