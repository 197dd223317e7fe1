"""Rows from the datasets library: `hf:NAME`, `hf:ORG/NAME/CONFIG`, or `hf:` and a local folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from expertly.data.config import Source
from expertly.data.documents import Row, missing_column, rows
from expertly.errors import ExpertlyError

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"


def split_name(path: str) -> tuple[str, str | None]:
    """A name for datasets and its config. Only a third part is a config: hf:ORG/NAME/CONFIG."""
    name = path.removeprefix(PREFIX)
    parts = name.split("/")
    if len(parts) != 3 or Path(name).exists():
        return name, None
    return "/".join(parts[:2]), parts[2]


def load(source: Source, *, require: bool = True) -> "Dataset":
    """The source's split. Raises E303 when missing or out of reach, E304 without the column.

    require: whether the source's column must be there.
    """
    import datasets

    name, config = split_name(source.path)
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            table = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            table = datasets.load_dataset(name, config, split=source.split, streaming=False)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        fix = "correct name, config or split, or download it first and name its folder"
        raise ExpertlyError("E303", source.path, why, fix=fix) from error
    if require and source.column not in table.column_names:
        raise missing_column(source.path, source.column, table.column_names)
    return table


def stamp(table: "Dataset", source: Source) -> list[list[object]]:
    """What changes when the dataset does: its rows and the Arrow files that datasets made."""
    made = sorted(Path(entry["filename"]) for entry in table.cache_files)
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in made]
    return [[source.path, source.split, table.num_rows], *stats]


def read(table: "Dataset", source: Source) -> Iterator[Row]:
    """One document per row, ids are NAME:SPLIT:ROW; an E304 for a row that has no text."""
    name = f"{Path(source.path.removeprefix(PREFIX)).name}:{source.split}"
    first = 1
    for batch in table.with_format("arrow").iter(batch_size=1024):
        values = batch[source.column].to_pylist()
        yield from rows(values, name, source.path, first)
        first += len(values)
