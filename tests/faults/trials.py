"""What a loader makes of mutants, each met in a worker process with a time limit.

"Wrong but accepted", the figure that must be 0, is defined by the two judges below:

weights  the folder has a manifest. Accepted and right: every tensor of the model that was opened
         equals the original's, bit for bit.
config   the folder has none, or its hashes alone would refuse every mutant. Accepted and right: the
         tensors of the model are the original's, all of them and no other (to within the rounding
         of another dtype), and it computes finite logits. A legal value (another rope_theta, relu
         for silu) describes another model that nothing in the folder contradicts: it counts as
         right here, and only a hash can tell.
"""

import faulthandler
import os
import re
import resource
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mutants import Mutant

from expertly.errors import ExpertlyError

# what the command line says of an error, all of it
LINE = re.compile(r"expertly: error\[(E\d{3})\] [^\n]+: [^\n]+\. FIX: [^\n]+\n")
_MEMORY = 4 * 2**30  # bytes that a worker may ask for beyond what it began with


def same_bits(model: Any, original: dict[str, torch.Tensor]) -> bool:
    """Whether every tensor is the original's."""
    tensors = model.state_dict()
    return tensors.keys() == original.keys() and all(
        value.dtype == original[name].dtype and value.equal(original[name])
        for name, value in tensors.items()
    )


def same_model(model: Any, original: dict[str, torch.Tensor]) -> bool:
    """Whether its tensors are the original's, rounded at most, and its logits finite."""
    tensors = model.state_dict()
    if tensors.keys() != original.keys():
        return False
    for name, value in tensors.items():
        if value.shape != original[name].shape:
            return False
        if not torch.allclose(value.float(), original[name].float(), rtol=0.01, atol=0.01):
            return False
    with torch.no_grad():
        logits = model.eval()(torch.arange(1, 7).unsqueeze(0)).logits
    return bool(logits.isfinite().all())


# --- Workers -----------------------------------------------------------------------------------


class Trial(NamedTuple):
    """One loader and the mutants that it is to meet."""

    mutant: Callable[[int], Mutant]
    load: Callable[[Path], Any]
    right: Callable[[Any], bool]


def outcome(trial: Trial, folder: Path, number: int) -> str:
    """What became of a mutant, in a folder that is its original's again afterwards."""
    files = trial.mutant(number).files
    before = {name: (folder / name).read_bytes() for name in files}
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return _judged(trial, folder)
    finally:
        for name, content in before.items():
            (folder / name).write_bytes(content)


def _judged(trial: Trial, folder: Path) -> str:
    try:
        model = trial.load(folder)
    except ExpertlyError as error:
        one = "\n" not in str(error) and error.exit_code == 3
        return "one line" if one else f"error: {error.code}"
    except BaseException as error:  # noqa: BLE001  whatever a loader may raise is a figure here
        return f"error: {type(error).__name__}"
    try:
        return "right" if trial.right(model) else "WRONG"
    except Exception:  # noqa: BLE001  a model that was accepted and cannot compute
        return "WRONG"


def try_all(trial: Trial, folder: Path, numbers: range, limit: float) -> list[str]:
    """The outcome of each mutant; `hang` past `limit` seconds, `crash` for a worker that died.

    Each is met in a forked process, so that neither takes this one with it. `folder` is the
    worker's own, and left as it was unless a worker was killed.
    """
    original = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outcomes: list[str] = []
    while len(outcomes) < len(numbers):
        for name, content in original.items():
            (folder / name).write_bytes(content)
        context = get_context("fork")
        ours, theirs = context.Pipe()
        rest = numbers[len(outcomes) :]
        worker = context.Process(target=_work, args=(trial, folder, rest, theirs), daemon=True)
        worker.start()
        theirs.close()
        outcomes += _collect(ours, len(rest), limit)
        worker.kill()
        worker.join()
    return outcomes


def _collect(pipe: Any, wanted: int, limit: float) -> list[str]:
    """Outcomes up to the first hang or crash."""
    got: list[str] = []
    while len(got) < wanted:
        if not pipe.poll(limit):
            return [*got, "hang"]
        try:
            got.append(pipe.recv())
        except EOFError:
            return [*got, "crash"]
    return got


def _work(trial: Trial, folder: Path, numbers: range, pipe: Any) -> None:
    faulthandler.disable()  # a crash is counted, not told
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        pipe.send(outcome(trial, folder, number))
