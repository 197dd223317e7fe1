"""Set a run up: everything that can be wrong is found before anything big is allocated."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW

from expertly.data.batches import Batch, Batches
from expertly.data.cache import TokenSet
from expertly.data.examples import ExampleSet
from expertly.errors import ExpertlyError
from expertly.families import family_of, moe_layer_indices, sizes
from expertly.models.attach import Attachment, attach
from expertly.models.build import ModelShape, build_model, model_config, twin_config
from expertly.models.experts import add_expert_dropout
from expertly.models.layers import own_policy
from expertly.models.loading import Model, Tokenizer, check_model, load_weights, open_config
from expertly.models.packed_loading import is_packed_folder
from expertly.models.policies import SavedPolicy, fill_bias, read_policy, require_sayable
from expertly.models.straight_through import StraightThrough, check_straight_through
from expertly.moe.policy import Policy, check_policy
from expertly.moe.routing import ROUTERS
from expertly.train.adapt import Adapted, adapt
from expertly.train.config import ModelConfig, RouterConfig, TrainConfig
from expertly.train.conversations import kept_apart, read_conversations
from expertly.train.freeze import Freeze
from expertly.train.optimizer import build_optimizer
from expertly.train.text import Data, Say, read_text


class Job(NamedTuple):
    """All that the loop works with."""

    config: TrainConfig  # as asked for, with the steps that its epochs take
    model: Model
    adapted: Adapted | None  # None: the model's own weights learn
    attachment: Attachment | None  # None: a dense model
    optimizer: AdamW
    freeze: Freeze
    data: Data
    autocast: AbstractContextManager
    stock: bool  # whether stock loaders compute the same function; True for a dense model

    @property
    def tokenizer(self) -> Tokenizer:
        """What the data was made with."""
        return self.data.tokenizer

    @property
    def batches(self) -> Batches:
        """To train on."""
        return self.data.batches

    @property
    def held_out(self) -> list[Batch]:
        """To evaluate on."""
        return self.data.held_out

    @property
    def sets(self) -> list[TokenSet] | list[ExampleSet]:
        """The domains, by the index that batches use."""
        return self.data.sets

    @property
    def domains(self) -> list[str]:
        """The names of the domains, by the index that batches use."""
        return [each.domain for each in self.sets]


def prepare(config: TrainConfig, checkpoint: Path | None, say: Say) -> Job:
    """Build model, data and optimizer, from a checkpoint's folder when one is given."""
    origin = Path(config.model.path) if config.model.path else None
    folder = origin if config.lora.r else checkpoint or origin  # adapters lie beside no model
    if folder is not None and not config.lora.r and is_packed_folder(folder):
        why = "its weights are packed, and packed weights are not trained"
        raise ExpertlyError("E202", str(folder), why, fix="open the original, or set lora.r")
    raw = (open_config(folder) if folder else _config(config.model, {})).to_dict()
    saved = read_policy(folder) if folder else None
    policy = policy_of(raw, config.router, saved) if _routes(raw) else None
    allowed = config.router.allow_non_stock
    stock = policy is None or require_sayable(raw, policy, allow_non_stock=allowed)
    device = torch.device(pick_device(config.device))
    if folder is not None and checkpoint is None:
        check_model(folder, verify=True)  # before hours of tokenising; a checkpoint was checked
    read = read_conversations if config.data.conversations else read_text
    data = read(config, folder, say)
    torch.manual_seed(config.seed)
    model = _model(config, folder, data.tokenizer)
    if config.data.conversations:
        data = kept_apart(config, model, data, say)
    config = _with_steps(config, data.batches.rows_per_epoch, say)
    adapted = adapt(model, config, checkpoint, say) if config.lora.r else None
    model.to(device).train()  # type: ignore[arg-type]
    attachment = _attach(model, policy, saved, config) if policy is not None else None
    if config.schedule.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    freeze = Freeze(model, attachment, config.optim.freeze, last=config.schedule.max_steps - 1)
    routers = [layer.router for layer in attachment.layers] if attachment else []
    optimizer = build_optimizer(model, routers, config.optim)
    learns = (adapted, attachment, optimizer, freeze)
    return Job(config, model, *learns, data, _cast(config, device), stock)


def _with_steps(config: TrainConfig, rows: int, say: Say) -> TrainConfig:
    """The config with the optimizer steps that its epochs take. rows: of one epoch."""
    schedule = config.schedule
    if not schedule.num_train_epochs:
        return config
    steps = max(1, math.ceil(schedule.num_train_epochs * rows / schedule.rows_per_step))
    say(
        f"schedule: {schedule.num_train_epochs:g} epochs of {rows:,} rows are {steps:,} steps "
        f"of {schedule.rows_per_step}"
    )
    return replace(config, schedule=replace(schedule, max_steps=steps))


def _attach(
    model: Model, policy: Policy, saved: SavedPolicy | None, asked: TrainConfig
) -> Attachment:
    """The policy at work on the model, with the biases that were saved and what else was asked."""
    attachment = attach(model, policy)
    if saved is not None:
        fill_bias(attachment, saved)
    if asked.model.expert_dropout:
        add_expert_dropout(model, asked.model.expert_dropout)
    if asked.router.straight_through:
        StraightThrough(model.config.to_dict(), attachment)
    return attachment


def policy_of(raw: dict[str, Any], router: RouterConfig, saved: SavedPolicy | None) -> Policy:
    """The routing policy that a config asks for, on a model with the config `raw`.

    What it leaves open is the family's own rule, or the one saved with the model. Raises E204
    for one that the model cannot follow.
    """
    own = saved.policy if saved else own_policy(raw)
    name = router.router or own.router
    policy = Policy(
        router=name,
        top_k=own.top_k if router.top_k is None else router.top_k,
        options={**(own.options if name == own.router else {}), **router.options},
        jitter=router.jitter,
        capacity_factor=router.capacity_factor,
        eval_capacity_factor=router.eval_capacity_factor,
        overflow=router.overflow,
        fill=router.fill,
    )
    check_policy(policy, sizes(raw).num_experts)
    if router.straight_through:
        check_straight_through(raw, name)
    if router.bias_update_rate and not ROUTERS[name].biased:
        fix = "set router.bias_update_rate=0, or router.router=biased_sigmoid_topk"
        raise ExpertlyError("E204", f"router {name}", "has no bias to update", fix=fix)
    return policy


def _routes(raw: dict[str, Any]) -> bool:
    """Whether there is a router in it: DeepSeek-V3's twin is its own class, all layers dense."""
    return family_of(raw) is not None and bool(moe_layer_indices(raw))


def pick_device(asked: str) -> str:
    """auto: the GPU where there is one. Raises E202 for a GPU that is not there."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ExpertlyError("E202", "device", "no CUDA device here", fix="set device=auto")
    return "cuda" if there and asked != "cpu" else "cpu"


def _config(model: ModelConfig, ids: dict[str, Any]) -> ModelShape:
    """The transformers config of a model from scratch; the twin's where that is asked for."""
    config = model_config(model.family, {**ids, **model.sizes(), **model.extra})
    return twin_config(config) if model.twin else config


def _model(config: TrainConfig, folder: Path | None, tokenizer: Tokenizer) -> Model:
    if folder is not None:
        dtype = torch.float32 if config.model.dtype == "float32" else "auto"
        model = load_weights(folder, dtype=dtype, bits=config.model.bits)
        _require_vocabulary(model.config, tokenizer)
        return model
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": None,
        "max_position_embeddings": max(2048, config.data.sequence_length),
    }
    shape = _config(config.model, ids)
    _require_vocabulary(shape, tokenizer)
    return build_model(shape)


def _require_vocabulary(shape: ModelShape, tokenizer: Tokenizer) -> None:
    """Raises E202 when the tokenizer makes ids that the model has no embedding for."""
    if len(tokenizer) > shape.vocab_size:
        why = f"it has {len(tokenizer)} tokens, the model only {shape.vocab_size}"
        fix = "use the model's own tokenizer, or a larger vocab_size"
        raise ExpertlyError("E202", "tokenizer", why, fix=fix)


def _cast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    if not config.schedule.bf16:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
