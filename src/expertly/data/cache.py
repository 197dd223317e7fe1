"""The token cache: each domain is tokenised once, kept on disk and mapped into memory.

A cached domain is a folder KEY/{train.bin, eval.bin, counts.json, MANIFEST.json}. KEY changes
with the files, the tokenizer and the held-out rule, so nothing in it ever becomes stale.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expertly import folders
from expertly.data.config import Source
from expertly.data.sources import by_domain, open_source, pieces, split_documents
from expertly.errors import ExpertlyError

_FORMAT = 3  # raise it when the same files should give other tokens
_COUNTS = (
    "documents",
    "tokens",
    "held_out_documents",
    "held_out_tokens",
    "bytes",
    "duplicates",
    "undecodable",
    "bad",
)
# Characters per call of `encode`: a tokenizer needs about 100 bytes of memory for each.
_BATCH = 1 << 20

Progress = Callable[[str, int, int], None]  # domain, documents and tokens so far


class Encoder(NamedTuple):
    """What this room needs of a tokenizer."""

    encode: Callable[[list[str]], list[list[int]]]  # without special tokens
    end_of_text: int  # put behind every document
    vocab_size: int  # every id is below it
    fingerprint: str  # changes whenever the ids would


class Rule(NamedTuple):
    """Which documents are left out of training."""

    eval_fraction: float  # held out
    skip_bad: bool = False  # unreadable rows are left out, instead of an E304


class TokenSet(NamedTuple):
    """The tokens of one domain."""

    domain: str
    train: np.ndarray  # (tokens,) uint16 or uint32: documents joined by end-of-text
    held_out: np.ndarray  # (tokens,), never trained on
    counts: dict[str, int]  # documents, tokens, held_out_documents, duplicates, undecodable, ...
    digest: str  # sha256 of the training tokens
    trains: bool = True  # False when all of its sources are `eval`
    held_out_digest: str = ""  # sha256 of the held-out tokens

    @property
    def size(self) -> int:
        """Tokens to train on."""
        return self.train.size

    def count(self, length: int) -> int:
        """How many rows of so many tokens there are to train on. Raises E303 for none."""
        if rows := self.train.size // length:
            return rows
        why = f"{self.train.size} training tokens are less than a row of {length}"
        fix = "add text or set a shorter data.sequence_length"
        if self.held_out.size >= length:
            why = f"{why}, {self.held_out.size} are held out"
            fix = "add documents, or set data.eval_fraction: 0 and name an eval source"
        raise ExpertlyError("E303", f"domain {self.domain}", why, fix=fix)

    def row(self, place: int, length: int) -> tuple[np.ndarray, ...]:
        """The tokens (seq,) of one of them."""
        return (self.train[place * length : (place + 1) * length],)


def token_sets(
    sources: Iterable[Source],
    encoder: Encoder,
    *,
    eval_fraction: float = 0.05,
    skip_bad: bool = False,
    cache_dir: str = "",
    progress: Progress | None = None,
) -> list[TokenSet]:
    """The tokens of every domain, read from the cache or made now.

    skip_bad: leave unreadable rows out and count them as `bad`. Raises E303 for a source that is
    missing or has no documents, E304 for an unreadable row without skip_bad, E401 when the cache
    cannot be written.
    """
    root = cache_root(cache_dir)
    domains = by_domain(sources)
    # All keys first: a missing source is reported before hours of tokenising, not after.
    rule = Rule(eval_fraction, skip_bad)
    keys = {name: cache_key(group, encoder, rule) for name, group in domains.items()}
    made = []
    for name, group in domains.items():
        folder = root / keys[name]
        if not _is_whole(folder):
            _make(folder, name, group, encoder, rule, progress)
        trains = any(not source.eval for source in group)
        made.append(_open(folder, name, _dtype(encoder), trains))
    return made


def cache_root(cache_dir: str = "") -> Path:
    """cache_dir, or $XDG_CACHE_HOME/expertly/tokens; XDG_CACHE_HOME is ~/.cache unless set."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "expertly" / "tokens"


def cache_key(sources: Sequence[Source], encoder: Encoder, rule: Rule) -> str:
    """Sha256 over all that decides a domain's tokens: files, columns, tokenizer, rule."""
    tokenizer = [encoder.fingerprint, encoder.end_of_text, _dtype(encoder).str]
    return sources_key(sources, _FORMAT, *rule, tokenizer)


def sources_key(sources: Sequence[Source], *parts: object) -> str:
    """Sha256 over what a list of sources holds, and over `parts`, which are JSON-able."""
    found = [[open_source(source).stamp, source.column, source.eval] for source in sources]
    return hashlib.sha256(json.dumps([*parts, found]).encode("utf-8")).hexdigest()


def _dtype(encoder: Encoder) -> np.dtype:
    return np.dtype("<u2" if encoder.vocab_size < 65536 else "<u4")


def _is_whole(folder: Path) -> bool:
    """Whether a cached domain can be used; a damaged one is removed, to be made again."""
    if not folder.is_dir():
        return False
    with contextlib.suppress(ExpertlyError):
        if folders.verify(folder, hashes=False):
            return True
    folders.remove_folder(folder)
    return False


def _make(
    folder: Path,
    domain: str,
    sources: Sequence[Source],
    encoder: Encoder,
    rule: Rule,
    progress: Progress | None,
) -> None:
    def write(hidden: Path) -> None:
        counts = dict.fromkeys(_COUNTS, 0)
        for counted in _tokenise(hidden, sources, encoder, rule):
            counts |= counted
            if progress:
                progress(domain, counts["documents"], counts["tokens"])
        if not counts["documents"] + counts["held_out_documents"]:
            unread = counts["undecodable"] + counts["bad"]
            why = f"no readable document, {unread} undecodable"
            raise ExpertlyError("E303", f"domain {domain}", why, fix="add UTF-8 text to it")
        folders.write_json(hidden / "counts.json", counts)

    try:
        folders.save_folder(folder, write)
    except ExpertlyError:
        # Another process was faster: its folder has the same key, hence the same tokens.
        if not folder.is_dir():
            raise


class _Piece(NamedTuple):
    text: str
    held_out: bool
    ends_document: bool


def _tokenise(
    folder: Path, sources: Sequence[Source], encoder: Encoder, rule: Rule
) -> Iterator[Counter[str]]:
    """Write train.bin and eval.bin; yields the running counts after each call of `encode`."""
    counts: Counter[str] = Counter()
    documents = split_documents(
        sources, rule.eval_fraction, lambda _, why: counts.update([why]), skip_bad=rule.skip_bad
    )
    cut = (
        _Piece(text, held_out, ends_document=at == len(parts) - 1)
        for document, held_out in documents
        for parts in [list(pieces(document.text, _BATCH))]
        for at, text in enumerate(parts)
    )
    with (folder / "train.bin").open("wb") as train, (folder / "eval.bin").open("wb") as held:
        for batch in _batched(cut):
            encoded = encoder.encode([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                end = [encoder.end_of_text] if piece.ends_document else []
                tokens = np.array([*ids, *end], dtype=_dtype(encoder))
                (held if piece.held_out else train).write(tokens.tobytes())
                prefix = "held_out_" if piece.held_out else ""
                counts[f"{prefix}tokens"] += tokens.size
                counts[f"{prefix}documents"] += piece.ends_document
                counts["bytes"] += len(piece.text.encode("utf-8"))
            yield counts
    yield counts  # once more: documents may have been skipped after the last call


def _batched(cut: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in cut:
        if batch and size + len(piece.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


def _open(folder: Path, domain: str, dtype: np.dtype, trains: bool) -> TokenSet:
    counts = folders.read_json(folder / "counts.json")
    files = folders.read_json(folder / folders.MANIFEST)["files"]
    train, held_out = (_map(folder / name, dtype) for name in ("train.bin", "eval.bin"))
    digest, held_out_digest = (files[name]["sha256"] for name in ("train.bin", "eval.bin"))
    return TokenSet(domain, train, held_out, counts, digest, trains, held_out_digest)


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    if not file.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r")
