"""The receipt of a training run: what happened to the experts and the router, with figures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertly.config import dump
from expertly.models.adapter_files import WEIGHTS
from expertly.models.attach import Attachment
from expertly.models.files import read_header
from expertly.models.inspect import Inspection, inspect_folder, part_of
from expertly.models.loading import Model
from expertly.receipts import Check, Receipt, fingerprint, versions, write
from expertly.train.config import TrainConfig
from expertly.train.evaluate import HeldOut
from expertly.train.freeze import Freeze
from expertly.train.setup import Job
from expertly.watch.records import METRICS, read_records
from expertly.watch.stats import LayerCounts


class Proof:
    """What the experts received since the run began, and where they and the routers started.

    It is saved in every checkpoint, so that a resumed run's receipt tells of the whole run.
    """

    def __init__(self, attachment: Attachment | None, freeze: Freeze | None = None):
        self._attachment, self._freeze = attachment, freeze
        self._start = _norms(attachment) if attachment else {}
        self._still = freeze.norms() if freeze else None
        self._received = torch.zeros(())  # (layers, experts) from the first step on
        self._taught = torch.zeros(())  # of these, what came while experts moved

    def add(self, counts: LayerCounts | None, *, moving: bool = True) -> None:
        """Count the assignments that one step's experts served. moving: whether they could learn"""
        if counts is not None:
            self._received = self._received + counts.load
            self._taught = self._taught + counts.load * moving

    def idle(self) -> int:
        """How many experts never received a token."""
        return int((self._received == 0).sum())

    def changed(self) -> dict[str, str]:
        """How many experts and routers are no longer as they were."""
        return {part: f"{int(m.sum())} of {m.numel()}" for part, m in self._moved().items()}

    def routers_changed(self) -> int:
        """How many routers are no longer as they were."""
        moved = self._moved().get("routers")
        return 0 if moved is None else int(moved.sum())

    def still_layers(self) -> int:
        """In how many layers no expert has changed."""
        return int((~self._moved()["experts"]).all(dim=1).sum())

    def unmoved(self) -> int:
        """How many experts received tokens when they could learn, and are still as they were."""
        moved = self._moved().get("experts")
        return 0 if moved is None else int(((self._taught > 0) & ~moved).sum())

    def frozen_moved(self) -> int | None:
        """How many parameters changed that were to stand still throughout; None: none were to."""
        now = self._freeze.norms() if self._freeze else None
        return None if now is None or self._still is None else int(now.ne(self._still).sum())

    def _moved(self) -> dict[str, Tensor]:
        """Whether each expert (layers, experts) and each router (layers,) has changed."""
        now = _norms(self._attachment) if self._attachment else {}
        return {part: (now[part] != self._start[part]).any(dim=-1) for part in now}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it; nothing for a dense model that moves as a whole."""
        kept = {} if self._still is None else {"still": self._still}
        if self._attachment is None:
            return kept
        return kept | {"received": self._received, "taught": self._taught, **self._start}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        self._still = state.get("still")
        if self._attachment is not None:
            self._received = state["received"]
            self._taught = state.get("taught", self._received)  # before there was freezing
            self._start = {part: state[part] for part in self._start}


def write_receipt(
    run: Path, checkpoint: Path, config: TrainConfig, job: Job, proof: Proof, held_out: HeldOut
) -> Receipt:
    """Write RUN/receipt.json."""
    finite = math.isfinite(held_out.loss)
    checks = [Check("held-out loss is a number", finite, held_out.loss)]
    if job.adapted is not None:
        sizes, saved_checks = _adapter(job, checkpoint)
    else:
        saved = inspect_folder(checkpoint, hashes=True)
        sizes = {"parameters": saved.total, "active_parameters": saved.active}
        saved_checks = _saved(saved, job.model)
    checks += saved_checks
    if job.attachment is not None:
        checks += _on_experts(proof, job) + _on_routers(proof, job)
    moved = proof.frozen_moved()
    if moved is not None:
        name = "parameters frozen throughout that changed"
        checks.append(Check(name, moved == 0, moved, 0, "report it"))
    receipt = Receipt(
        job="train",
        inputs=_inputs(config, job),
        versions=versions("torch", "transformers", "safetensors", "tokenizers"),
        changed=proof.changed() | _policy(job),
        checks=tuple(checks),
        figures={
            "held_out_loss": held_out.loss,
            "held_out_loss_by_domain": held_out.domains,
            **sizes,
            "trouble": _trouble(run),
            **_divergence(run),
        },
    )
    write(receipt, run)
    return receipt


def _trouble(run: Path) -> dict[str, int]:
    """How often something was wrong on the way, from what the run wrote down."""
    records = read_records(run / METRICS)
    kinds = ("alarm", "skipped", "rolled_back", "rebalanced")
    return {kind: sum(kind in record for record in records) for kind in kinds}


def _divergence(run: Path) -> dict[str, Any]:
    """How alike experts were in the last evaluation; nothing for a dense model."""
    found = [each["divergence"] for each in read_records(run / METRICS) if "divergence" in each]
    return {"divergence": found[-1]} if found else {}


def _inputs(config: TrainConfig, job: Job) -> dict[str, Any]:
    """Config, machine, sha256 of every domain's tokens, and of the model gone on from."""
    digests = {each.domain: each.held_out_digest for each in job.sets}
    inputs = {
        "config": dump(config),
        "data": job.batches.state()["belongs_to"],
        "held_out": {"eval_tokens": config.data.eval_tokens, "sha256": digests},
        "documents": {each.domain: each.counts for each in job.sets},
        "machine": _machine(job.model.device),
    }
    start = Path(config.model.path)
    if config.model.path and start.is_dir():  # the run may have outlived it
        inputs["model"] = fingerprint(start)
    return inputs


def _machine(device: torch.device) -> dict[str, Any]:
    """What the last figures of a loss, and every second, depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}


def _policy(job: Job) -> dict[str, Any]:
    """The policy that the router learnt under, and whether stock loaders follow it too."""
    if job.attachment is None or job.attachment.policy is None:
        return {}
    policy = job.attachment.policy
    fields = ("router", "top_k", "options", "capacity_factor")
    said = {name: getattr(policy, name) for name in fields} | {"stock": job.stock}
    note = {} if job.stock else {"note": "stock loaders compute another function"}
    return {"policy": said | note}


def _on_experts(proof: Proof, job: Job) -> list[Check]:
    """Whether experts received tokens, and learnt where they could."""
    if job.config.data.conversations:
        return _on_few_tokens(proof, job)
    idle, more = proof.idle(), "raise router.router_aux_loss_coef or train longer"
    checks = [Check("experts that received no token", idle == 0, idle, 0, more)]
    if job.freeze.experts_ever_move():
        name, unmoved = "experts that received tokens but did not change", proof.unmoved()
        checks.append(Check(name, unmoved == 0, unmoved, 0, "raise optim.learning_rate"))
    return checks


def _on_few_tokens(proof: Proof, job: Job) -> list[Check]:
    """Of a small set, which need not reach every expert, nor teach it where it reaches.

    The last layer's experts learn from the tokens before an assistant's alone.
    """
    learn = job.freeze.experts_ever_move()
    if job.adapted is not None:
        learn = any(row.part == "experts" and row.weights for row in job.adapted.wrapped)
    if not learn:
        return []
    name, still = "MoE layers of which no expert changed", proof.still_layers()
    return [Check(name, still == 0, still, 0, "raise optim.learning_rate, or train longer")]


def _on_routers(proof: Proof, job: Job) -> list[Check]:
    """Whether frozen routers stood still."""
    if job.config.optim.router_learning_rate != 0 or "router" in job.config.lora.targets:
        return []
    changed = proof.routers_changed()
    return [Check("frozen routers that changed", changed == 0, changed, 0, "report it")]


def _adapter(job: Job, checkpoint: Path) -> tuple[dict[str, Any], list[Check]]:
    """What of the model learnt, and whether the checkpoint holds all of it."""
    assert job.adapted is not None
    learning = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    base = inspect_folder(job.adapted.base)
    total = base.total
    saved = sum(header.parameters for header in read_header(checkpoint / WEIGHTS))
    sizes = {
        "parameters": total,
        "active_parameters": base.active,
        "learning_parameters": learning,
        "learning_share": learning / total,
        "adapters": {row.part: row._asdict() for row in job.adapted.wrapped},
        "router": job.adapted.router,
    }
    return sizes, [Check("saved parameters of adapters", saved == learning, saved, learning)]


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
    """Numbers per expert (layers, experts, 2) and per router (layers, 1) that training moves."""
    layers = attachment.layers
    experts = [_expert_norms(layer.experts) for layer in layers]
    routers = [_router_norm(layer.router) for layer in layers]
    return {"experts": torch.stack(experts).cpu(), "routers": torch.stack(routers).cpu()}


def _router_norm(router: nn.Module) -> Tensor:
    """The norm of its parameters: (1,). A selection bias is none of them: it steers, unlearnt."""
    learning = (
        parameter
        for name, parameter in router.named_parameters()
        if not name.endswith("e_score_correction_bias")
    )
    around = [
        p for term in getattr(router, "low_rank", {}).values() for p in term.lora_B.parameters()
    ]
    norms = [parameter.double().norm() for parameter in (*learning, *around)]
    return torch.stack(norms).norm().reshape(1)


def _expert_norms(experts: Any) -> Tensor:
    """The norms of each expert's two matrices, or of the adapters beside them: (experts, n)."""
    if terms := getattr(experts, "low_rank", None):
        factors = [part for name in sorted(terms) for part in terms[name].factors()[:2]]
        return torch.stack([f.double().flatten(1).norm(dim=1) for f in factors], dim=-1)
    if hasattr(experts, "packed"):  # they cannot move
        return torch.zeros(experts.packed.num_experts, 2)
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    norms = [weight.double().flatten(1).norm(dim=1) for weight in (up, experts.down_proj)]
    return torch.stack(norms, dim=-1)
