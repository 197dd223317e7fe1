"""Adapters in a run: put beside a model's weights, or taken from a checkpoint, and told of."""

from pathlib import Path
from typing import NamedTuple

from expertly.models.adapter_files import load_adapter
from expertly.models.adapters import AdapterSpec, Wrapped, add_adapter, layers_of, wrapped
from expertly.models.loading import Model
from expertly.train.config import TrainConfig
from expertly.train.text import Say


class Adapted(NamedTuple):
    """What learns beside the weights of a model."""

    base: Path  # the model's folder
    wrapped: list[Wrapped]
    router: str  # frozen | trainable | lora


def adapt(model: Model, config: TrainConfig, checkpoint: Path | None, say: Say) -> Adapted:
    """Put adapters beside the weights, so that nothing else learns but routers where asked for.

    Raises E202 for targets that match nothing, E305 for a checkpoint of another model, E306 for
    experts that adapters cannot reach, E207 without PEFT.
    """
    base, lora = Path(config.model.path), config.lora
    if checkpoint is not None:
        load_adapter(model, checkpoint, base=base)
    else:
        spec = AdapterSpec(r=lora.r, lora_alpha=lora.lora_alpha, targets=lora.targets)
        add_adapter(model, spec)
    adapted = Adapted(base, wrapped(model), _router(config))
    if adapted.router == "trainable":
        for layer in layers_of(model):
            layer.router.requires_grad_(True)
    say(_told(model, adapted))
    return adapted


def _router(config: TrainConfig) -> str:
    if "router" in config.lora.targets:
        return "lora"
    return "trainable" if config.optim.router_learning_rate else "frozen"


def _told(model: Model, adapted: Adapted) -> str:
    """What is wrapped, part by part, in one line."""
    parts = [
        f"{row.part.replace('_', ' ')} {row.weights} weights, {row.parameters:,} parameters"
        for row in adapted.wrapped
        if row.weights
    ]
    others = [row.part.replace("_", " ") for row in adapted.wrapped if not row.weights]
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    left = [part for part in others if part != "router"]
    line = f"adapters: {'; '.join(parts)}; router {adapted.router}"
    line += f"; none on {', '.join(left)}" if left else ""
    return f"{line}; {learning:,} numbers learn"
