"""The receipt of a training run: what happened to the experts and the router, with figures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertly.config import dump
from expertly.models.attach import Attachment
from expertly.models.inspect import Inspection, inspect_folder, part_of
from expertly.models.loading import Model
from expertly.receipts import Check, Receipt, fingerprint, versions, write
from expertly.train.config import TrainConfig
from expertly.train.evaluate import HeldOut
from expertly.train.setup import Job
from expertly.watch.stats import LayerCounts


class Proof:
    """What the experts received since the run began, and where they and the routers started.

    It is saved in every checkpoint, so that a resumed run's receipt tells of the whole run.
    """

    def __init__(self, attachment: Attachment | None):
        self._attachment = attachment
        self._start = _norms(attachment) if attachment else {}
        self._received = torch.zeros(())  # (layers, experts) from the first step on

    def add(self, counts: LayerCounts | None) -> None:
        """Count the assignments that one step's experts served."""
        if counts is not None:
            self._received = self._received + counts.load.cpu()

    def idle(self) -> int:
        """How many experts never received a token."""
        return int((self._received == 0).sum())

    def changed(self) -> dict[str, str]:
        """How many experts and routers are no longer as they were."""
        if self._attachment is None:
            return {}
        return {
            part: f"{int((now != self._start[part]).sum())} of {now.numel()}"
            for part, now in _norms(self._attachment).items()
        }

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it; nothing for a dense model."""
        if self._attachment is None:
            return {}
        return {"received": self._received, **self._start}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        if self._attachment is not None:
            self._received = state["received"]
            self._start = {part: state[part] for part in self._start}


def write_receipt(
    run: Path, checkpoint: Path, config: TrainConfig, job: Job, proof: Proof, held_out: HeldOut
) -> Receipt:
    """Write RUN/receipt.json."""
    saved = inspect_folder(checkpoint, hashes=True)
    finite = math.isfinite(held_out.loss)
    checks = [Check("held-out loss is a number", finite, held_out.loss), *_saved(saved, job.model)]
    if job.attachment is not None:
        idle = proof.idle()
        checks.append(Check("experts that received no token", idle == 0, idle, 0))
    receipt = Receipt(
        job="train",
        inputs=_inputs(config, job),
        versions=versions("torch", "transformers", "safetensors", "tokenizers"),
        changed=proof.changed(),
        checks=tuple(checks),
        figures={
            "held_out_loss": held_out.loss,
            "held_out_loss_by_domain": held_out.domains,
            "parameters": saved.total,
            "active_parameters": saved.active,
        },
    )
    write(receipt, run)
    return receipt


def _inputs(config: TrainConfig, job: Job) -> dict[str, Any]:
    """The config, sha256 of every domain's training tokens, and of the model gone on from."""
    inputs = {"config": dump(config), "data": job.batches.state()["belongs_to"]}
    start = Path(config.model.path)
    if config.model.path and start.is_dir():  # the run may have outlived it
        inputs["model"] = fingerprint(start)
    return inputs


def _saved(saved: Inspection, model: Model) -> list[Check]:
    """Whether the checkpoint holds as many numbers as the model, and as many of its experts."""
    # by address, because tied tensors have two names and are saved once
    once = {t.data_ptr(): (part_of(name), t.numel()) for name, t in model.state_dict().items()}
    total = sum(size for _, size in once.values())
    experts = sum(size for part, size in once.values() if part == "experts")
    on_disk = saved.parameters.get("experts", 0)
    return [
        Check("saved parameters", saved.total == total, saved.total, total),
        Check("saved parameters of experts", on_disk == experts, on_disk, experts),
    ]


@torch.no_grad()
def _norms(attachment: Attachment) -> dict[str, Tensor]:
    """A number per expert (layers, experts) and per router (layers,) that training moves."""
    layers = attachment.layers
    experts = [layer.experts.down_proj.double().flatten(1).norm(dim=1) for layer in layers]
    routers = [layer.router.weight.double().norm() for layer in layers]
    return {"experts": torch.stack(experts).cpu(), "routers": torch.stack(routers).cpu()}
