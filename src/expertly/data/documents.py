"""Documents: which files a path stands for, and how a text, JSON lines or parquet file is read.

First step of the walk of a batch. It does not know domains, tokenizers or held-out documents.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from expertly.errors import ExpertlyError, nearest


class Document(NamedTuple):
    """One text and the name that decides whether it is held out."""

    id: str
    text: str


class File(NamedTuple):
    """One file of a source."""

    id: str  # relative to the source, so that it is the same on every machine
    path: Path
    kind: str  # names the reader, see sources.READERS


# What readers of rows give: a bad row is a value, so that it need not end the reading.
Row = Document | ExpertlyError

# Told (id, why) of each document that is left out; `why` is a key of TokenSet.counts.
Skip = Callable[[str, str], None]

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_LINE = 64 * 2**20  # bytes: a longer one is a file of another kind

_KINDS = {".jsonl": "lines", ".json": "lines", ".parquet": "parquet"}


def find_files(path: str) -> list[File]:
    """The files that a file name, a folder or a glob stands for, sorted.

    Hidden files in folders are passed over. A .json file holds JSON lines only where the path
    itself ends so; in a folder it may be anything. Raises E303 when nothing is there.
    """
    root = Path(path).expanduser()
    if os.path.isdir(root):  # not Path.is_dir, which raises for a name that is too long
        found, base = list(walk(root)), root
    elif os.path.isfile(root):
        found, base = [root], root.parent
    elif glob.has_magic(path):
        names = glob.glob(str(root), recursive=True)
        found, base = sorted(Path(name) for name in names if os.path.isfile(name)), glob_base(root)
    else:
        raise ExpertlyError("E303", path, "no such file or folder", fix="correct the path")
    if not found:
        raise ExpertlyError("E303", path, "matches no file", fix="name a folder that holds text")
    named = not root.is_dir() and root.suffix.lower() == ".json"
    return [File(file.relative_to(base).as_posix(), file, kind_of(file, named)) for file in found]


def glob_base(pattern: Path) -> Path:
    """The folder in front of a pattern's first wildcard."""
    parts = pattern.parts
    wild = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:wild])


def walk(root: Path, passed_over: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every visible file below `root`, sorted, without the folders named in `passed_over`."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name[0] != "." and name not in passed_over)
        for name in sorted(names):
            path = Path(folder, name)
            # is_file: neither pipes, which would block, nor broken links
            if name[0] != "." and path.is_file():
                yield path


def kind_of(path: Path, json_is_lines: bool) -> str:
    """How a user's file is read: by its suffix, and as text unless that says otherwise."""
    suffix = path.suffix.lower()
    return "text" if suffix == ".json" and not json_is_lines else _KINDS.get(suffix, "text")


def read_text(file: File, column: str, skip: Skip) -> Iterator[Document]:
    """The whole file as one document; one that is no UTF-8 text is skipped as `undecodable`."""
    text = decode(file, skip)
    if text.strip():
        yield Document(file.id, text)


def decode(file: File, skip: Skip) -> str:
    """A file's text, or "" after telling `skip` that it has none. Raises E303 when unreadable."""
    try:
        text = file.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise unreadable(file.path, error) from error
    if "\0" in text:  # binary formats may happen to decode
        skip(file.id, "undecodable")
        return ""
    return text


def read_lines(file: File, column: str, skip: Skip) -> Iterator[Row]:
    """One document per JSON line, or an E304 with file:line for a line that has no text."""
    for number, found in json_lines(file, f'{{"{column}": "..."}}'):
        if isinstance(found, ExpertlyError):
            yield found
        elif column not in found:
            yield missing_column(f"{file.path}:{number}", column, list(found))
        else:
            yield from rows([found[column]], file.id, str(file.path), first=number)


def json_lines(file: File, example: str) -> Iterator[tuple[int, dict | ExpertlyError]]:
    """Each line's number and object, or the E304 for one that is none; blank lines are left out.

    example: of an object, for the advice.
    """
    number = 0
    try:
        with file.path.open("rb") as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if line.strip():
                    yield number, _object_in(line, example, f"{file.path}:{number}")
    except OSError as error:
        raise unreadable(file.path, error) from error
    if not number:
        yield 1, ExpertlyError("E304", f"{file.path}:1", "is empty", fix="leave the file out")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, of one too long only its first part: it is never held whole."""
    while line := stream.readline(_LONGEST_LINE + 1):
        rest = line
        while len(rest) > _LONGEST_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(_LONGEST_LINE + 1)
        yield line


def _object_in(line: bytes, example: str, where: str) -> dict | ExpertlyError:
    if len(line.rstrip(b"\n")) > _LONGEST_LINE:
        why = f"is longer than {_LONGEST_LINE // 2**20} MiB"
        return ExpertlyError("E304", where, why, fix="divide it, or leave the file out")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        fix = "write one JSON object per line, or leave the file out"
        return ExpertlyError("E304", where, f"is not JSON ({error})", fix=fix)
    if isinstance(row, dict):
        return row
    fix = f"write one object such as {example} per line"
    return ExpertlyError("E304", where, "is not a JSON object", fix=fix)


def read_parquet(file: File, column: str, skip: Skip) -> Iterator[Row]:
    """One document per row, streamed, or an E304 with file:row for a row that has no text.

    Raises E304 for a file that is no parquet or lacks the column.
    """
    import pyarrow
    import pyarrow.parquet

    where = str(file.path)
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            if column not in table.schema_arrow.names:
                raise missing_column(where, column, table.schema_arrow.names)
            first = 1
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                yield from rows(batch.column(0).to_pylist(), file.id, where, first)
                first += batch.num_rows
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        why = f"cannot be read ({error})"
        raise ExpertlyError("E304", where, why, fix="write the file again") from error
    except OSError as error:
        raise unreadable(file.path, error) from error


def rows(values: list[object], name: str, where: str, first: int) -> Iterator[Row]:
    """One document per value that is not blank; its id is `name:row`, counted from 1.

    An E304 with `where:row` for a value that is no string or holds a lone surrogate.
    """
    for row, value in enumerate(values, start=first):
        at = f"{where}:{row}"
        if not isinstance(value, str):
            why = f"holds {type(value).__name__}, not a string"
            fix = "name a column of strings, or remove the row"
            yield ExpertlyError("E304", at, why, fix=fix)
        elif found := _SURROGATE.search(value):
            why = f"holds a lone surrogate at character {found.start()}"
            yield ExpertlyError("E304", at, why, fix="remove the row")
        elif value.strip():
            yield Document(f"{name}:{row}", value)


def sound(read: Iterable[Row], skip: Skip, *, skip_bad: bool) -> Iterator[Document]:
    """The documents alone. The first bad row is raised; with skip_bad all are told as `bad`."""
    for row in read:
        if isinstance(row, Document):
            yield row
        elif skip_bad:
            skip(row.what, "bad")
        else:
            raise row


def missing_column(where: str, column: str, known: list[str]) -> ExpertlyError:
    """The E304 for rows without the column that was asked for."""
    fix = f"set column: {nearest(column, known)}" if known else "leave it out"
    return ExpertlyError("E304", where, f"has no column {column!r}", fix=fix)


def unreadable(path: Path, error: OSError) -> ExpertlyError:
    """The E303 for a file that the operating system does not let us read."""
    why = (error.strerror or str(error)).lower()
    return ExpertlyError("E303", str(path), why, fix="make it readable or leave it out")
