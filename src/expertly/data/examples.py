"""Examples to fine-tune on: dialogues, completions and texts as tokens, and what of them is learnt.

Sets are small, so they are read whole and kept in memory.
"""

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expertly.data import hub
from expertly.data.config import Source
from expertly.data.dialogues import FORMATS, Said, no_assistant, said_in
from expertly.data.documents import File, decode, find_files, json_lines, unreadable
from expertly.data.sources import by_domain, is_held_out
from expertly.errors import ExpertlyError

_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, ..]}'
_BATCH = 64  # rows of a table at once


class Tokens(NamedTuple):
    """A row as tokens."""

    ids: list[int]
    learnt: list[bool]  # which of them the model learns to write


Encode = Callable[[Said], Tokens]  # raises ValueError for what a template does not take


class Example(NamedTuple):
    """One row of a set."""

    id: str
    ids: np.ndarray  # (tokens,) int32
    learnt: np.ndarray  # (tokens,) bool


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one domain."""

    domain: str
    train: list[Example]
    held_out: list[Example]
    counts: Counter[str]  # documents, tokens, learnt, held_out_documents, cut, unlearnable, bad, ..

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.train)

    @property
    def digest(self) -> str:
        """The sha256 of what is trained on."""
        return _digest(self.train)

    @property
    def held_out_digest(self) -> str:
        """The sha256 of what is held out."""
        return _digest(self.held_out)


def read_examples(
    sources: Sequence[Source],
    encode: Encode,
    *,
    length: int,
    eval_fraction: float,
    skip_bad: bool = False,
) -> list[ExampleSet]:
    """The examples of each domain, none longer than `length` tokens: what is behind is cut off.

    Rows are held out by house rule 7; where it takes none of a domain, the one whose id hashes
    lowest is held out, and where it takes all, the highest is not. Of examples that are equal after
    the cut the first is kept. Raises E303 for a source that is missing, E304 for a row that is
    unreadable (with skip_bad it is counted) and for a domain in which nothing is to be learnt.
    """
    sets = []
    for domain, group in by_domain(sources).items():
        counts = Counter[str]()
        found = [
            (example, source.eval)
            for source in sorted(group, key=lambda source: not source.eval)
            for example in _encoded(source, encode, counts, skip_bad=skip_bad)
        ]
        kept = [*_once(_learnable(found, length, counts), counts)]
        if not kept:
            raise no_assistant(f"domain {domain}")
        sets.append(_split(domain, kept, eval_fraction, counts))
    return sets


def _split(
    domain: str, kept: list[tuple[Example, bool]], eval_fraction: float, counts: Counter[str]
) -> ExampleSet:
    ids = {each.id for each, is_eval in kept if not is_eval}
    out = _held_out(ids, eval_fraction, others=any(is_eval for _, is_eval in kept))
    train = [each for each, is_eval in kept if not is_eval and each.id not in out]
    held_out = [each for each, is_eval in kept if is_eval or each.id in out]
    counts.update(documents=len(train), held_out_documents=len(held_out))
    counts.update(tokens=_size(train), held_out_tokens=_size(held_out))
    counts.update(learnt=sum(int(each.learnt.sum()) for each in train))
    return ExampleSet(domain, train, held_out, counts)


def _held_out(ids: set[str], eval_fraction: float, *, others: bool) -> set[str]:
    """Which of a domain's training rows are held out. others: whether it has eval rows as well."""
    order = sorted(
        ids, key=lambda id: hashlib.sha256(id.encode("utf-8", "surrogateescape")).digest()
    )
    out = {id for id in order if is_held_out(id, eval_fraction)}
    if not out and not others and eval_fraction:
        out.update(order[:1])
    return out if len(out) < len(ids) else out - {*order[-1:]}


def _encoded(
    source: Source, encode: Encode, counts: Counter[str], *, skip_bad: bool
) -> Iterator[Example]:
    """A source's rows as examples. The first bad one is raised, or with skip_bad all counted."""
    for id, where, row in _rows(source, counts):
        try:
            if isinstance(row, ExpertlyError):
                raise row
            yield _example(id, where, row, encode)
        except ExpertlyError as error:
            if error.code != "E304" or not skip_bad:
                raise
            counts["bad"] += 1


def _example(id: str, where: str, row: Mapping[str, object], encode: Encode) -> Example:
    try:
        tokens = encode(said_in(row))
    except ValueError as error:
        fix = "correct the row, or set data.skip_bad=true"
        raise ExpertlyError("E304", where, str(error), fix=fix) from error
    return Example(id, np.array(tokens.ids, dtype=np.int32), np.array(tokens.learnt, dtype=bool))


def _once(
    found: Iterable[tuple[Example, bool]], counts: Counter[str]
) -> Iterator[tuple[Example, bool]]:
    """Of equal examples the first."""
    seen = set()
    for example, is_eval in found:
        key = hashlib.sha256(example.ids.tobytes()).digest()[:16]
        counts["duplicates"] += key in seen
        if key not in seen:
            seen.add(key)
            yield example, is_eval


def _learnable(
    found: Iterable[tuple[Example, bool]], length: int, counts: Counter[str]
) -> Iterator[tuple[Example, bool]]:
    """Those with something to learn in their first tokens, cut to these."""
    for example, is_eval in found:
        counts["cut"] += len(example.ids) > length
        cut = Example(example.id, example.ids[:length], example.learnt[:length])
        if cut.learnt[1:].any():  # a first token follows none
            yield cut, is_eval
        else:
            counts["unlearnable"] += 1


def _rows(
    source: Source, counts: Counter[str]
) -> Iterator[tuple[str, str, Mapping[str, object] | ExpertlyError]]:
    """Each row's id, where it stands, and its columns."""
    if source.path.startswith(hub.PREFIX):
        name = f"{Path(source.path.removeprefix(hub.PREFIX)).name}:{source.split}"
        table = hub.load(source, require=False)
        yield from _numbered(name, source.path, table)
        return
    for file in find_files(source.path):
        where = str(file.path)
        lines = file.kind == "lines" or file.path.suffix.lower() == ".json"
        if file.kind == "parquet":
            yield from _numbered(file.id, where, _table(file))
        elif lines and not _is_array(file):
            for number, found in json_lines(file, _EXAMPLE):
                yield f"{file.id}:{number}", f"{where}:{number}", found
        elif lines:
            yield from _numbered(file.id, where, _array(file))
        elif text := decode(file, lambda _, why: counts.update([why])).strip():
            yield file.id, where, {"text": text}


def _numbered(
    name: str, where: str, rows: Iterable[object]
) -> Iterator[tuple[str, str, Mapping[str, object] | ExpertlyError]]:
    for number, row in enumerate(rows, start=1):
        at = f"{where}:{number}"
        fix = f"give each row columns: {FORMATS}"
        bad = ExpertlyError("E304", at, "is not a JSON object", fix=fix)
        yield f"{name}:{number}", at, row if isinstance(row, dict) else bad


def _is_array(file: File) -> bool:
    """Whether a .json file is one array of rows, as ShareGPT's are, and not an object a line."""
    try:
        with file.path.open("rb") as stream:
            return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError as error:
        raise unreadable(file.path, error) from error


def _array(file: File) -> list[object]:
    try:
        return list(json.loads(file.path.read_bytes()))
    except (ValueError, RecursionError, MemoryError) as error:
        why, fix = f"is not JSON ({error})", "write one JSON object per line"
        raise ExpertlyError("E304", str(file.path), why, fix=fix) from error
    except OSError as error:
        raise unreadable(file.path, error) from error


def _table(file: File) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        why = f"cannot be read ({error})"
        raise ExpertlyError("E304", str(file.path), why, fix="write the file again") from error
    except OSError as error:
        raise unreadable(file.path, error) from error


def _size(examples: Sequence[Example]) -> int:
    return sum(len(each.ids) for each in examples)


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for each in examples:
        for array in (np.array([len(each.ids)]), each.ids, each.learnt):
            digest.update(array.tobytes())
    return digest.hexdigest()
