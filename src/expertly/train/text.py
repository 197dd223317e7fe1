"""The data of a run on text: its tokenizer, every domain's tokens, batches and held-out rows."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from expertly.data.batches import Batch, Batches, eval_batches
from expertly.data.cache import Encoder, TokenSet, cache_root, sources_key, token_sets
from expertly.data.config import DataConfig
from expertly.data.examples import ExampleSet
from expertly.data.sources import domain_weights, expand, training_sample
from expertly.errors import ExpertlyError
from expertly.folders import save_folder
from expertly.models.loading import Tokenizer
from expertly.models.tokenizer import (
    encode_batch,
    open_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from expertly.train.config import TrainConfig

# a byte-level BPE of a few thousand tokens does not get better from more text than this
_TOKENIZER_BYTES = 16 * 1024 * 1024

# counts of what a domain lost, and what one and many of them are called
_LEFT_OUT = (
    ("undecodable", "file not UTF-8, left out", "files not UTF-8, left out"),
    ("bad", "unreadable row, left out", "unreadable rows, left out"),
    ("duplicates", "copy", "copies"),
)

Say = Callable[[str], None]  # one line for the user


class Data(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    sets: list[TokenSet] | list[ExampleSet]  # by the index that batches use
    batches: Batches
    held_out: list[Batch]


def read_text(config: TrainConfig, folder: Path | None, say: Say) -> Data:
    """Rows cut from each domain's stream of tokens. folder: the model's, None from scratch."""
    config = replace(config, data=_expanded(config.data, say))
    tokenizer = _tokenizer(config.data, folder, say)
    sets = tokenize(config.data, tokenizer, say)
    return Data(tokenizer, sets, *_batches(config, sets))


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
