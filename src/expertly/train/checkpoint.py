"""A training checkpoint: a stock model folder, and in expertly/ all that steers the next step."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from expertly.errors import ExpertlyError
from expertly.folders import checkpoints, read_json, save_folder, verify, write_json
from expertly.models.loading import Model, save_model
from expertly.train.proof import Proof
from expertly.train.setup import Job

STATE = "expertly"  # the folder of our own state inside a checkpoint


class Progress(NamedTuple):
    """Where a run stands."""

    step: int  # optimizer steps done
    tokens: int  # training tokens seen
    seconds: float  # of training, without evaluation and saving
    data: dict[str, Any]  # the batches' position


def save_checkpoint(run: Path, job: Job, proof: Proof, progress: Progress) -> Path:
    """Write RUN/checkpoint-N, whole or not at all. Raises E401 when the disk refuses."""

    def write(folder: Path) -> None:
        save_model(
            job.model,
            folder,
            tokenizer=job.tokenizer,
            attachment=job.attachment,
            allow_non_stock=True,  # set-up has refused a policy for which that was not asked
        )
        state = folder / STATE
        state.mkdir(exist_ok=True)
        save_file(_moments(job.model, job.optimizer), state / "optimizer.safetensors")
        save_file(_random_states(), state / "random.safetensors")
        if kept := proof.state():
            save_file(kept, state / "proof.safetensors")
        write_json(state / "progress.json", progress._asdict())

    return save_folder(run / f"checkpoint-{progress.step}", write)


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the highest step in a run folder, or None."""
    found = checkpoints(run)
    return found[-1] if found else None


def verified_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint, every sha256 checked; None before the first. Raises E301, E302."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return None
    fix = f"delete {checkpoint} to resume from the one before it"
    try:
        whole = verify(checkpoint)
    except ExpertlyError as error:
        raise ExpertlyError(error.code, error.what, error.why, fix=fix) from error
    if not whole:
        raise ExpertlyError("E301", str(checkpoint), "its MANIFEST.json is missing", fix=fix)
    return checkpoint


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
    if job.attachment is not None:
        proof.restore(load_file(checkpoint / STATE / "proof.safetensors"))
    states = load_file(checkpoint / STATE / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


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
