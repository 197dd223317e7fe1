"""A training checkpoint: a stock model folder, and in expertly/ all that steers the next step."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from expertly.folders import read_json, save_folder, verify, write_json
from expertly.models.attach import Attachment
from expertly.models.loading import Model, Tokenizer, save_model

STATE = "expertly"  # the folder of our own state inside a checkpoint


class Progress(NamedTuple):
    """Where a run stands."""

    step: int  # optimizer steps done
    tokens: int  # training tokens seen
    seconds: float  # of training, without evaluation and saving
    data: dict[str, Any]  # the batches' position


def save_checkpoint(
    run: Path,
    model: Model,
    tokenizer: Tokenizer,
    attachment: Attachment | None,
    optimizer: AdamW,
    progress: Progress,
) -> Path:
    """Write RUN/checkpoint-N, whole or not at all. Raises E401 when the disk refuses."""

    def write(folder: Path) -> None:
        save_model(model, folder, tokenizer=tokenizer, attachment=attachment)
        (folder / STATE).mkdir(exist_ok=True)
        save_file(_moments(model, optimizer), folder / STATE / "optimizer.safetensors")
        save_file(_steering(attachment), folder / STATE / "steering.safetensors")
        write_json(folder / STATE / "progress.json", progress._asdict())

    return save_folder(run / f"checkpoint-{progress.step}", write)


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the highest step in a run folder, or None."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _name(path))]
    return max(found)[1] if found else None


def verified_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint, every sha256 checked; None before the first. Raises E301, E302."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is not None:
        verify(checkpoint)
    return checkpoint


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    return Progress(**read_json(checkpoint / STATE / "progress.json"))


def restore(
    checkpoint: Path, model: Model, attachment: Attachment | None, optimizer: AdamW
) -> None:
    """Put optimizer moments, biases and random states back; the weights are the model's."""
    moments = load_file(checkpoint / STATE / "optimizer.safetensors")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            optimizer.state[parameter] = {
                key: moments[f"{key}.{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    steering = load_file(checkpoint / STATE / "steering.safetensors")
    for index, bias in enumerate(attachment.bias if attachment else []):
        if bias is not None:
            bias.copy_(steering[f"bias.{index}"])
    torch.set_rng_state(steering["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in steering:
        torch.cuda.set_rng_state(steering["rng.cuda"])


def _name(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def _moments(model: Model, optimizer: AdamW) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[id(parameter)]}": value.cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _steering(attachment: Attachment | None) -> dict[str, Tensor]:
    """Small tensors that steer a step: the routers' biases and the random states."""
    biases = attachment.bias if attachment else []
    steering = {f"bias.{i}": b.cpu().clone() for i, b in enumerate(biases) if b is not None}
    steering["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        steering["rng.cuda"] = torch.cuda.get_rng_state()
    return steering
