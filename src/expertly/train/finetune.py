"""Fine-tune a pretrained MoE: what a training run is asked for then, and what it did to routing."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from expertly.config import build
from expertly.data.batches import Batch
from expertly.errors import ExpertlyError
from expertly.families import family_of
from expertly.folders import save_file
from expertly.models.configs import read_config
from expertly.models.loading import open_model
from expertly.models.packed_loading import choose_device
from expertly.receipts import read
from expertly.train.config import TrainConfig
from expertly.train.loop import run_to_end
from expertly.train.text import Data, Say
from expertly.watch.audit import Text
from expertly.watch.drift import drift_report
from expertly.watch.page import page

Method = Literal["lora", "full"]
RouterPolicy = Literal["frozen", "trainable", "lora"]

PAGE, REPORT = "drift.html", "drift.json"
_LOOK = 8192  # tokens of each domain that drift is measured on, at most

# Sparse models overfit small sets sooner than dense ones, and want smaller batches and a higher
# rate (ST-MoE, arXiv 2202.08906, section 4); expert dropout is theirs, too. A router that stands
# still needs no balance loss; one that learns does so at a tenth of the rate, because a small set
# says little on how tokens should be spread.
_RATES = {"lora": 2e-4, "full": 5e-5}
_ROUTER_SHARE = 0.1
_EXPERT_DROPOUT = {"lora": 0.0, "full": 0.1}  # adapters are few numbers: they overfit less
_BALANCE = 0.001  # of routers that learn, for the balance loss and for the z-loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is asked of a fine-tuning; the rest follows, and overrides change any of it."""

    model: str
    data: tuple[str, ...]
    output_dir: str
    method: Method = "lora"
    router: RouterPolicy = "frozen"
    rank: int = 8
    bits: int | None = None
    epochs: float = 3.0
    base_data: tuple[str, ...] = ("stdlib",)  # text of the base's domains, to see forgetting


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """How a fine-tuning ended."""

    run: Path
    checkpoint: Path
    steps: int
    tokens: int
    seconds: float  # of training
    loss: dict[str, list[float]]  # by domain, held-out: the base's, then now
    learning_parameters: int
    parameters: int
    changed: dict[str, str]  # experts and routers, by the receipt
    drift: dict[str, Any]
    page: Path


def train_config(recipe: Recipe, overrides: Sequence[str] = ()) -> TrainConfig:
    """The training run that a recipe stands for. Raises E201, E202 and E208 as config.build."""
    if recipe.method == "full" and recipe.router == "lora":
        fix = "choose trainable, or leave method=full out"
        raise ExpertlyError("E202", "router", "lora is for method=lora", fix=fix)
    low_rank, rate = recipe.method == "lora", _RATES[recipe.method]
    learns = recipe.router != "frozen"
    given: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "model": {
            "path": recipe.model,
            "expert_dropout": _EXPERT_DROPOUT[recipe.method],
            "bits": recipe.bits,
            "dtype": "auto" if low_rank else "float32",
        },
        "data": {
            "sources": [
                *({"path": path} for path in recipe.data),
                *({"path": path, "eval": True} for path in recipe.base_data),
            ],
            "conversations": True,
            "sequence_length": 1024,
            "eval_tokens": 16384,
        },
        "router": dict.fromkeys(
            ("router_aux_loss_coef", "router_z_loss_coef"), _BALANCE if learns else 0.0
        ),
        "optim": {
            "learning_rate": rate,
            "router_learning_rate": _ROUTER_SHARE * rate if recipe.router == "trainable" else 0.0,
            "weight_decay": 0.0 if low_rank else 0.01,
        },
        "schedule": {"num_train_epochs": recipe.epochs, "per_device_train_batch_size": 4},
        "eval": {"eval_steps": 50},
        "log": {"logging_steps": 5, "save_steps": 200},
    }
    if low_rank:
        given["lora"] = _lora(recipe)
    return build(TrainConfig, given, overrides)


def _lora(recipe: Recipe) -> dict[str, Any]:
    targets = ["experts", "attention", *(["router"] if recipe.router == "lora" else [])]
    return {"r": recipe.rank, "lora_alpha": 2.0 * recipe.rank, "targets": targets}


def run(config: TrainConfig, say: Say, *, resume: bool = False) -> FinetuneResult:
    """Train, then see how routing and losses drifted from the base; all in config.output_dir.

    Raises E305 for a model without experts, and what loop.run_to_end does.
    """
    base = Path(config.model.path)
    _require_experts(base)
    ended = run_to_end(config, resume=resume)
    trained, folder = ended.result, ended.result.run
    gc.collect()  # hooks tie the model into cycles, and drift opens two, one at a time
    opens = [partial(_open, each, config) for each in (trained.checkpoint, base)]
    title = f"{folder.name}/{trained.checkpoint.name}"
    texts = _texts(ended.data)
    report = drift_report(title, read_config(base), texts, (opens[0], opens[1]), base.name, say)
    save_file(folder / REPORT, json.dumps(report["drift"], indent=2) + "\n")
    save_file(folder / PAGE, page(report))
    receipt = read(folder)
    figures = receipt.figures
    return FinetuneResult(
        run=folder,
        checkpoint=trained.checkpoint,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=trained.seconds,
        loss={domain: of["loss"] for domain, of in report["drift"]["domains"].items()},
        learning_parameters=figures.get("learning_parameters", figures["parameters"]),
        parameters=figures["parameters"],
        changed={part: receipt.changed[part] for part in ("experts", "routers")},
        drift=report["drift"],
        page=folder / PAGE,
    )


def _require_experts(base: Path) -> None:
    if family_of(read_config(base)) is None:
        fix = "name an MoE, or go on with it by expertly train"
        raise ExpertlyError("E305", str(base), "has no experts", fix=fix)


def _open(folder: Path, config: TrainConfig) -> Any:
    """A model as it was trained: on the same bits and device."""
    device = choose_device(Path(config.model.path), config.model.bits)
    device = "cpu" if config.device == "cpu" else device
    return open_model(folder, bits=config.model.bits, device=device)


def _texts(data: Data) -> dict[str, Text]:
    """The held-out rows of each domain, up to _LOOK tokens."""
    found: dict[str, list[Batch]] = {}
    for batch in data.held_out:
        known = found.setdefault(data.sets[int(batch.domains[0])].domain, [])
        if sum(each.input_ids.numel() for each in known) < _LOOK:
            known.append(batch)
    return {domain: _joined(batches) for domain, batches in found.items()}


def _joined(batches: Sequence[Batch]) -> Text:
    parts = [(b.input_ids, b.learnt, b.position_ids) for b in batches]
    return Text(
        *(torch.cat([p for p in column if p is not None]) for column in zip(*parts, strict=True))
    )
