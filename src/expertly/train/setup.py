"""Set a run up: everything that can be wrong is found before anything big is allocated."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW

from expertly.data.batches import Batch, Batches, eval_batches
from expertly.data.cache import Encoder, TokenSet, cache_root, sources_key, token_sets
from expertly.data.config import DataConfig
from expertly.data.sources import domain_weights, expand, training_sample
from expertly.errors import ExpertlyError
from expertly.families import family_of, moe_layer_indices, sizes
from expertly.folders import save_folder
from expertly.models.attach import Attachment, attach
from expertly.models.build import ModelShape, build_model, model_config, twin_config
from expertly.models.experts import add_expert_dropout
from expertly.models.layers import own_policy
from expertly.models.loading import Model, Tokenizer, check_model, load_weights, open_config
from expertly.models.packed_loading import is_packed_folder
from expertly.models.policies import SavedPolicy, fill_bias, read_policy, require_sayable
from expertly.models.straight_through import StraightThrough, check_straight_through
from expertly.models.tokenizer import (
    encode_batch,
    open_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from expertly.moe.policy import Policy, check_policy
from expertly.moe.routing import ROUTERS
from expertly.train.config import ModelConfig, RouterConfig, TrainConfig
from expertly.train.freeze import Freeze
from expertly.train.optimizer import build_optimizer

# a byte-level BPE of a few thousand tokens does not get better from more text than this
_TOKENIZER_BYTES = 16 * 1024 * 1024

# counts of what a domain lost, and what one and many of them are called
_LEFT_OUT = (
    ("undecodable", "file not UTF-8, left out", "files not UTF-8, left out"),
    ("bad", "unreadable row, left out", "unreadable rows, left out"),
    ("duplicates", "copy", "copies"),
)

Say = Callable[[str], None]  # one line for the user


class Job(NamedTuple):
    """All that the loop works with."""

    model: Model
    tokenizer: Tokenizer
    attachment: Attachment | None  # None: a dense model
    optimizer: AdamW
    freeze: Freeze
    batches: Batches
    held_out: list[Batch]
    sets: list[TokenSet]  # by the index that batches use
    autocast: AbstractContextManager
    stock: bool  # whether stock loaders compute the same function; True for a dense model

    @property
    def domains(self) -> list[str]:
        """The names of the domains, by the index that batches use."""
        return [each.domain for each in self.sets]


def prepare(config: TrainConfig, checkpoint: Path | None, say: Say) -> Job:
    """Build model, data and optimizer, from a checkpoint's folder when one is given."""
    folder = checkpoint or (Path(config.model.path) if config.model.path else None)
    if folder is not None and is_packed_folder(folder):
        why = "its weights are packed, and packed weights are not trained"
        raise ExpertlyError("E202", str(folder), why, fix="open the original")
    raw = (open_config(folder) if folder else _config(config.model, {})).to_dict()
    saved = read_policy(folder) if folder else None
    policy = policy_of(raw, config.router, saved) if _routes(raw) else None
    allowed = config.router.allow_non_stock
    stock = policy is None or require_sayable(raw, policy, allow_non_stock=allowed)
    device = torch.device(pick_device(config.device))
    if folder is not None and checkpoint is None:
        check_model(folder, verify=True)  # before hours of tokenising; a checkpoint was checked
    config = replace(config, data=_expanded(config.data, say))
    tokenizer = _tokenizer(config.data, folder, say)
    sets = tokenize(config.data, tokenizer, say)
    batches, held_out = _batches(config, sets)
    torch.manual_seed(config.seed)
    model = _model(config, folder, tokenizer)
    model.to(device).train()  # type: ignore[arg-type]
    attachment = _attach(model, policy, saved, config) if policy is not None else None
    if config.schedule.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    freeze = Freeze(model, attachment, config.optim.freeze, last=config.schedule.max_steps - 1)
    routers = [layer.router for layer in attachment.layers] if attachment else []
    optimizer = build_optimizer(model, routers, config.optim)
    cast = _cast(config, device)
    learns = (attachment, optimizer, freeze)
    return Job(model, tokenizer, *learns, batches, held_out, sets, cast, stock)


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


def _expanded(data: DataConfig, say: Say) -> DataConfig:
    """The data with its sources expanded, once: site-packages is large, and is walked for it."""
    sources, missing = expand(data.sources)
    for name in missing:
        say(f"data: {name} is not on this machine, left out")
    return replace(data, sources=tuple(sources))


def tokenize(data: DataConfig, tokenizer: Tokenizer, say: Say) -> list[TokenSet]:
    """The tokens of every domain, from the cache where it has them; one line each to the user."""
    encoder = Encoder(
        encode=lambda texts: encode_batch(tokenizer, texts),
        end_of_text=tokenizer.eos_token_id,
        vocab_size=len(tokenizer),
        fingerprint=tokenizer_fingerprint(tokenizer),
    )
    sets = token_sets(
        data.sources,
        encoder,
        eval_fraction=data.eval_fraction,
        cache_dir=data.cache_dir,
        skip_bad=data.skip_bad,
        progress=_now_and_then(say),
    )
    for each in sets:
        say(_told(each))
    return sets


def _told(each: TokenSet) -> str:
    """A domain's line: its tokens, and what of it was left out."""
    train, held_out = len(each.train), len(each.held_out)
    line = f"data: {each.domain}: {train:,} tokens to train on, {held_out:,} held out"
    left_out = [
        f"{count:,} {many if count > 1 else one}"
        for key, one, many in _LEFT_OUT
        if (count := each.counts[key])
    ]
    return f"{line} ({'; '.join(left_out)})" if left_out else line


def _now_and_then(say: Say, every: float = 10.0) -> Callable[[str, int, int], None]:
    """Tell how far tokenising is, at most once in `every` seconds."""
    last = time.monotonic()

    def progress(domain: str, documents: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last > every:
            last = time.monotonic()
            say(f"data: {domain}: {documents:,} documents, {tokens:,} tokens so far")

    return progress


def _config(model: ModelConfig, ids: dict[str, Any]) -> ModelShape:
    """The transformers config of a model from scratch; the twin's where that is asked for."""
    config = model_config(model.family, {**ids, **model.sizes(), **model.extra})
    return twin_config(config) if model.twin else config


def _model(config: TrainConfig, folder: Path | None, tokenizer: Tokenizer) -> Model:
    if folder is not None:
        model = load_weights(folder, dtype=torch.float32)
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


def _tokenizer(data: DataConfig, folder: Path | None, say: Say) -> Tokenizer:
    """The one that was named, else the checkpoint's own, else one trained on the data."""
    if data.tokenizer or folder is not None:
        return open_tokenizer(data.tokenizer or str(folder))
    parts = ("tokenizer", data.vocab_size, data.eval_fraction, _TOKENIZER_BYTES)
    kept = cache_root(data.cache_dir) / f"tokenizer-{sources_key(data.sources, *parts)}"
    if not kept.is_dir():
        say(f"tokenizer: training a byte-level BPE of {data.vocab_size:,} tokens")
        texts = training_sample(
            data.sources, _TOKENIZER_BYTES, data.eval_fraction, skip_bad=data.skip_bad
        )
        trained = train_tokenizer(texts, data.vocab_size)
        try:
            save_folder(kept, lambda folder: save_tokenizer(trained, folder))
        except ExpertlyError:
            # another run, perhaps the twin, was faster with the same one
            if not kept.is_dir():
                raise
    return open_tokenizer(kept)


def _batches(config: TrainConfig, sets: list[TokenSet]) -> tuple[Batches, list[Batch]]:
    size, length = config.schedule.per_device_train_batch_size, config.data.sequence_length
    batches = Batches(
        sets,
        domain_weights(config.data.sources),
        batch_size=size,
        sequence_length=length,
        seed=config.seed,
    )
    held_out = eval_batches(
        sets, batch_size=size, sequence_length=length, eval_tokens=config.data.eval_tokens
    )
    return batches, held_out


def _cast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    if not config.schedule.bf16:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
