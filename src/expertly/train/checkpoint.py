"""A training checkpoint: a stock model folder, and in expertly/ all that steers the next step."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST, checkpoints, read_json, save_folder, verify, write_json
from expertly.models.adapter_files import save_adapter
from expertly.models.loading import Model, save_model
from expertly.models.tokenizer import save_tokenizer
from expertly.train.proof import Proof
from expertly.train.setup import Job

STATE = "expertly"  # the folder of our own state inside a checkpoint
ALARMS = "alarms.safetensors"


class Progress(NamedTuple):
    """Where a run stands."""

    step: int  # optimizer steps done
    tokens: int  # training tokens seen
    seconds: float  # of training, without evaluation and saving
    data: dict[str, Any]  # the batches' position
    guard: Mapping[str, Any] = MappingProxyType({})  # losses that the next one is held against
    remedy: Mapping[str, Any] = MappingProxyType({})  # what a collapse has changed, see health.py


def save_checkpoint(
    run: Path, job: Job, proof: Proof, progress: Progress, alarms: Mapping[str, Tensor]
) -> Path:
    """Write RUN/checkpoint-N, whole or not at all. Raises E401 when the disk refuses.

    alarms: what the router's alarms have seen so far; empty for a dense model.
    """
    moments = _moments(job.model, job.optimizer)

    said = {name: _plain(value) for name, value in progress._asdict().items()}

    def write(folder: Path) -> None:
        _save_learnt(job, folder)
        state = folder / STATE
        state.mkdir(exist_ok=True)
        save_file(moments, state / "optimizer.safetensors")
        save_file(_random_states(), state / "random.safetensors")
        if kept := proof.state():
            save_file(kept, state / "proof.safetensors")
        if alarms:
            save_file(dict(alarms), state / ALARMS)
        write_json(state / "progress.json", said)

    learnt = [*job.model.state_dict().values()]
    if job.adapted:
        learnt = [each for each in job.model.parameters() if each.requires_grad]
    need = sum(tensor.nbytes for tensor in (*learnt, *moments.values()))
    return save_folder(checkpoint_at(run, progress.step), write, need=need)


def _save_learnt(job: Job, folder: Path) -> None:
    """The model, or the adapters beside it, with the tokenizer."""
    if job.adapted:
        routers = job.adapted.router == "trainable"
        save_adapter(job.model, folder, base=job.adapted.base, trained_routers=routers)
        save_tokenizer(job.tokenizer, folder)
        return
    save_model(
        job.model,
        folder,
        tokenizer=job.tokenizer,
        attachment=job.attachment,
        allow_non_stock=True,  # set-up has refused a policy for which that was not asked
    )


def checkpoint_at(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or will."""
    return run / f"checkpoint-{step}"


def whole_checkpoint(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every sha256 agrees; None before the first.

    Damaged newer ones are said and kept aside as checkpoint-N.damaged. Raises E301 or E302 when
    no other is left: a run that was announced as saved must not silently begin again.
    """
    damage: list[tuple[Path, ExpertlyError]] = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            _require_whole(checkpoint)
        except ExpertlyError as error:
            damage.append((checkpoint, error))
            continue
        for damaged, found in damage:
            say(f"{found.what}: {found.why}. Kept as {_set_aside(damaged).name}")
        if damage:
            say(f"going on from {checkpoint.name}, the newest whole checkpoint")
        return checkpoint
    if not damage:
        return None
    fix = f"copy one back, or delete all in {run} to start from the beginning"
    newest = damage[0][1]
    raise ExpertlyError(newest.code, newest.what, newest.why, fix=fix) from newest


def _require_whole(checkpoint: Path) -> None:
    if not verify(checkpoint):
        why = "its MANIFEST.json is missing"
        raise ExpertlyError("E301", str(checkpoint), why, fix="copy the folder again")
    listed = read_json(checkpoint / MANIFEST)["files"].keys()
    there = (path for path in checkpoint.rglob("*") if not path.is_dir())
    for name in sorted(path.relative_to(checkpoint).as_posix() for path in there):
        if name != MANIFEST and name not in listed:
            why = f"its MANIFEST.json does not list {name}"
            raise ExpertlyError("E301", str(checkpoint), why, fix="copy the folder again")


def _set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that no save and no resume looks at."""
    names = (f"{checkpoint.name}.damaged{n or ''}" for n in itertools.count())
    free = next(name for name in names if not (checkpoint.parent / name).exists())
    return checkpoint.rename(checkpoint.with_name(free))


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    return Progress(**read_json(checkpoint / STATE / "progress.json"))


def restore(checkpoint: Path, job: Job, proof: Proof) -> None:
    """Put optimizer moments, proof and random states back.

    Weights and biases are there already: the model and its policy were opened from this folder.
    """
    parameters = dict(job.model.named_parameters())
    for entry, value in load_file(checkpoint / STATE / "optimizer.safetensors").items():
        key, name = entry.split(".", 1)
        parameter = parameters[name]
        job.optimizer.state[parameter][key] = value.to(parameter.device)
    if proof.state():
        proof.restore(load_file(checkpoint / STATE / "proof.safetensors"))
    states = load_file(checkpoint / STATE / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def read_alarms(checkpoint: Path) -> dict[str, Tensor]:
    """What the router's alarms had seen at a checkpoint; empty for a dense model."""
    file = checkpoint / STATE / ALARMS
    return load_file(file) if file.is_file() else {}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _moments(model: Model, optimizer: AdamW) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[id(parameter)]}": value.cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
