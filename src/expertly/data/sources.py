"""Sources: their domains, which of their documents are held out, a sample for the tokenizer.

Everything that reads text passes here, so that tokenizer and model agree on what is held out.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from expertly.data import hub
from expertly.data.builtin import (
    DOMAINS,
    builtin_files,
    names,
    read_docstrings,
    read_page,
    read_topics,
)
from expertly.data.config import Source
from expertly.data.documents import (
    Document,
    File,
    Row,
    Skip,
    find_files,
    glob_base,
    read_lines,
    read_parquet,
    read_text,
    sound,
    unreadable,
)
from expertly.errors import ExpertlyError

READERS: dict[str, Callable[[File, str, Skip], Iterable[Row]]] = {
    "text": read_text,
    "lines": read_lines,
    "parquet": read_parquet,
    "topics": read_topics,
    "page": read_page,
    "docstrings": read_docstrings,
}


class Corpus(NamedTuple):
    """A source that was found: what changes when its contents do, and a way to read it."""

    stamp: list[list[object]]  # JSON-able
    rows: Callable[[Skip], Iterable[Row]]

    def read(self, skip: Skip, *, skip_bad: bool = False) -> Iterator[Document]:
        """Its documents. Raises E303, and E304 for a bad row unless skip_bad."""
        return sound(self.rows(skip), skip, skip_bad=skip_bad)


def expand(sources: Iterable[Source]) -> tuple[list[Source], list[str]]:
    """Sources with their domains named, a bare `stdlib` or `site` replaced by its three.

    A bare name's weight is shared evenly. Returns also the built-in sources that this machine
    lacks, for a line in the log; they are left out. What was expanded once stays as it is, at
    no cost: callers of this room who pass such a list on save the walk that a bare name takes.
    Raises E303 for an unknown built-in.
    """
    known, missing = [], []
    for source in sources:
        parts = names(source.path)
        if len(parts) < 2:
            known.append(replace(source, domain=source.domain or default_domain(source.path)))
            continue
        present = [part for part in parts if builtin_files(part)]
        missing += [part for part in parts if part not in present]
        weight = None if source.weight is None else source.weight / max(1, len(present))
        known += [
            replace(source, path=part, domain=source.domain or DOMAINS[part], weight=weight)
            for part in present
        ]
    return known, missing


def default_domain(path: str) -> str:
    """A path's own name: the stem of a file, the folder of a glob, the dataset of `hf:`."""
    if path in DOMAINS:
        return DOMAINS[path]
    if path.startswith(hub.PREFIX):
        return hub.split_name(path)[0].rstrip("/").rpartition("/")[2]
    root = Path(path).expanduser()
    if has_magic(path) and not os.path.exists(root):
        root = glob_base(root)
    root = root.resolve()
    return root.name if os.path.isdir(root) else root.stem


def by_domain(sources: Iterable[Source]) -> dict[str, list[Source]]:
    """The sources of each domain, in the order in which domains first appear."""
    grouped: dict[str, list[Source]] = {}
    for source in expand(sources)[0]:
        grouped.setdefault(source.domain, []).append(source)
    if not grouped:
        fix = "name a file, a folder or stdlib under data.sources"
        raise ExpertlyError("E303", "data.sources", "no source is left", fix=fix)
    return grouped


def domain_weights(sources: Iterable[Source]) -> dict[str, float] | None:
    """The weight of each training domain, or None when no source names one.

    Raises E202 when only some sources have a weight, or one is not above zero.
    """
    training = [source for source in expand(sources)[0] if not source.eval]
    if all(source.weight is None for source in training):
        return None
    weights: dict[str, float] = {}
    for source in training:
        if source.weight is None or not 0 < source.weight < float("inf"):
            why = f"has weight {source.weight} while others are weighted"
            fix = "give every training source a weight above 0, or none of them"
            raise ExpertlyError("E202", source.path, why, fix=fix)
        weights[source.domain] = weights.get(source.domain, 0.0) + source.weight
    return weights


def open_source(source: Source) -> Corpus:
    """Find a source's files. Raises E303 when there are none, E304 for a wrong `hf:` column."""
    if source.path.startswith(hub.PREFIX):
        table = hub.load(source)
        return Corpus(hub.stamp(table, source), lambda skip: hub.read(table, source))
    built_in = names(source.path)
    files = [file for name in built_in for file in builtin_files(name)]
    if not built_in:
        files = find_files(source.path)
    if not files:
        why, fix = "this Python was installed without it", "install it or leave the source out"
        raise ExpertlyError("E303", source.path, why, fix=fix)
    return Corpus([_stamp(file) for file in files], lambda skip: _read(files, source.column, skip))


def _stamp(file: File) -> list[object]:
    # The time stands for the contents: hashing a large corpus at every start would take minutes.
    try:
        stat = file.path.stat()
    except OSError as error:
        raise unreadable(file.path, error) from error
    return [file.id, file.kind, stat.st_size, stat.st_mtime_ns]


def _read(files: Iterable[File], column: str, skip: Skip) -> Iterator[Row]:
    for file in files:
        yield from READERS[file.kind](file, column, skip)


def is_held_out(document_id: str, eval_fraction: float) -> bool:
    """House rule 7: sha256 of the id, modulo 100, below `eval_fraction` in percents."""
    digest = hashlib.sha256(document_id.encode("utf-8", "surrogateescape")).hexdigest()
    return int(digest, 16) % 100 < round(100 * eval_fraction)


def split_documents(
    sources: Sequence[Source], eval_fraction: float, skip: Skip, *, skip_bad: bool = False
) -> Iterator[tuple[Document, bool]]:
    """The documents of one domain, each with whether it is held out; equal texts come once.

    A copy is left out as `duplicates`, with skip_bad an unreadable row as `bad`. Sources with
    `eval` go first, so that their documents never come back as training documents.
    """
    seen = set()
    for source in sorted(sources, key=lambda source: not source.eval):
        for document in open_source(source).read(skip, skip_bad=skip_bad):
            # half a sha256: collisions stay out of reach and large corpora in memory
            digest = hashlib.sha256(document.text.encode("utf-8")).digest()[:16]
            if digest in seen:
                skip(document.id, "duplicates")
                continue
            seen.add(digest)
            yield document, source.eval or is_held_out(document.id, eval_fraction)


def pieces(text: str, limit: int) -> Iterator[str]:
    """A text in pieces of about `limit` characters that end at a line's end where they can."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def training_sample(
    sources: Iterable[Source], limit_bytes: int, eval_fraction: float, *, skip_bad: bool = False
) -> list[str]:
    """An even, repeatable sample of the training documents, for training a tokenizer.

    It holds all of them when they fit in `limit_bytes` (of UTF-8), otherwise about half of the
    limit up to the limit, as pieces of documents spread over all sources.
    """
    found = (
        piece
        for domain in by_domain(sources).values()
        for document, held_out in split_documents(
            domain, eval_fraction, lambda *_: None, skip_bad=skip_bad
        )
        if not held_out
        for piece in pieces(document.text, 16384)
    )
    return spread(found, limit_bytes)


def spread(texts: Iterable[str], limit_bytes: int) -> list[str]:
    """Some of the texts, evenly spread, whose UTF-8 fits in a limit; all when they fit."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, text in enumerate(texts):
        if number % stride == 0:
            kept.append(text)
            size += len(text.encode("utf-8"))
        # One pass over text of unknown size: when full, keep every other one.
        while size > limit_bytes and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(len(text.encode("utf-8")) for text in kept)
    return kept
