"""The receipt of a training run: what happened to the experts and the router, with figures."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertly.config import dump
from expertly.models.attach import Attachment
from expertly.models.inspect import inspect_folder
from expertly.receipts import Check, Receipt, versions, write
from expertly.train.config import TrainConfig
from expertly.train.evaluate import HeldOut
from expertly.watch.stats import LayerCounts

if TYPE_CHECKING:
    from expertly.train.setup import Job


class Proof:
    """What the experts received since the run began or was resumed, and where they started."""

    def __init__(self, attachment: Attachment | None):
        self._attachment = attachment
        self._before = _norms(attachment) if attachment else None
        self.received: Tensor | None = None  # (layers, experts), assignments served

    def add(self, counts: LayerCounts | None) -> None:
        """Count one step."""
        if counts is not None:
            self.received = counts.load if self.received is None else self.received + counts.load

    def changed(self) -> dict[str, str]:
        """How many experts and routers are no longer as they were."""
        if self._attachment is None or self._before is None:
            return {}
        return {
            name: f"{int((now != before).sum())} of {now.numel()}"
            for (name, before), now in zip(
                self._before.items(), _norms(self._attachment).values(), strict=True
            )
        }


def write_receipt(
    run: Path, checkpoint: Path, config: TrainConfig, job: "Job", proof: Proof, held_out: HeldOut
) -> Receipt:
    """Write RUN/receipt.json."""
    saved = inspect_folder(checkpoint, hashes=True)
    in_memory = sum(p.numel() for p in job.model.parameters())
    checks = [Check("held-out loss is a number", held_out.loss == held_out.loss, held_out.loss)]
    if proof.received is not None:
        idle = int((proof.received == 0).sum())
        checks.append(Check("experts that received no token", idle == 0, idle, 0))
    checks.append(Check("saved parameters", saved.total >= in_memory, saved.total, in_memory))
    receipt = Receipt(
        job="train",
        inputs={"config": dump(config), "data": job.batches.state()["belongs_to"]},
        versions=versions("torch", "transformers", "safetensors", "tokenizers"),
        changed=proof.changed(),
        checks=tuple(checks),
        figures={"held_out_loss": held_out.loss, **held_out.domains, "active": saved.active},
    )
    write(receipt, run)
    return receipt


@torch.no_grad()
def _norms(attachment: Attachment) -> dict[str, Tensor]:
    """A number per expert (layers, experts) and per router (layers,) that training moves."""
    return {
        "experts": torch.stack(
            [layer.experts.down_proj.double().flatten(1).norm(dim=1) for layer in attachment.layers]
        ),
        "routers": torch.stack(
            [layer.router.weight.double().norm() for layer in attachment.layers]
        ),
    }
