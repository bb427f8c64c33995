"""Reads the rows of tables as hubs hand them out: parquet files, or the arrow files that `save_to_disk` of datasets
leaves.

    data/validation-00000-of-00001.parquet   by name, in any folder; or validation/0000.parquet, by folder
    validation/data-00000-of-00001.arrow     of several splits; one alone lies with a state.json that names it
    images-validation.arrow                as the cache of datasets keeps it, one file or numbered ones

Knows files, splits and pyarrow, which is imported when a table is opened. Does not know what columns mean.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mllm.utils.extras import install_line

SUFFIXES = (".parquet", ".arrow")
DEFAULT_SPLIT = "train"
NUM_ROWS_AT_ONCE = 64
"""Rows hold images."""
_WORD = "(?:train|training|validation|valid|val|dev|test|testing|eval|evaluation)"
_NUMBERED = r"-\d{5}-of-\d{5}"
_OF_PARQUET = re.compile(rf"(.+?){_NUMBERED}.*|({_WORD}(?![a-z])[^-]*).*", re.IGNORECASE)
_OF_CACHE = re.compile(rf".+-({_WORD})(?:{_NUMBERED})?", re.IGNORECASE)
_OF_FOLDER = re.compile(rf"(?:partial-)?{_WORD}(?![a-z]).*", re.IGNORECASE)
"""A hub names the beginning of a large split partial-train."""


def is_table(source: Path) -> bool:
    """Tell whether the source is a table, or a folder with tables somewhere in it."""
    if source.is_file():
        return source.suffix in SUFFIXES
    return any(next(source.rglob(f"*{suffix}"), None) is not None for suffix in SUFFIXES)


def all_tables(folder: Path) -> list[Path]:
    """List every table in a folder and below it, in order."""
    return sorted(file for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}"))


def chosen_tables(files: Sequence[Path], folder: Path, split: str | None) -> list[Path]:
    """Return those of some tables that are of a split: of train where None is named, or all where nothing names one.

    Args:
        folder: that they lie in, on a disk or on a hub.

    Raises:
        FileNotFoundError: there is none; the splits that are there are named.
    """
    try:
        return _of_split(files, folder, split or DEFAULT_SPLIT)
    except FileNotFoundError:
        if split is not None or not files or _named_splits(files, folder):
            raise
        return list(files)


def _named_splits(files: Sequence[Path], folder: Path) -> list[str]:
    """Return the splits that tables are of, by their names, the folders below this one and what lies beside them;
    sorted, and none where nothing names one.
    """
    return sorted({split for file in files if (split := _split_of(file, folder)) is not None})


def table_files(source: Path, split: str, *, inside: Sequence[str] = ()) -> list[Path]:
    """Return the files of a split, in order; the source itself where it is a file.

    Args:
        inside: folders that are looked into alone where one of them is there, as a hub's data set may hold several.

    Raises:
        FileNotFoundError: there is none; the splits that are there are named.
    """
    if source.is_file():
        return [source]
    folder = next((source / name for name in inside if (source / name).is_dir()), source)
    return _of_split(all_tables(folder), folder, split)


def _of_split(tables: Sequence[Path], folder: Path, split: str) -> list[Path]:
    files = [file for file in tables if _is_of(file, split)]
    if not files:
        others = ", ".join(_named_splits(tables, folder))
        hint = f"; there are tables of {others} (data.reader.split, or --split)" if others else ""
        raise FileNotFoundError(
            f"{folder} holds no table of the split {split}; looked for {split}-*.parquet, {split}/*.parquet and "
            f"{split}/*.arrow{hint}"
        )
    return files


def table_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table.

    Raises:
        ValueError: it cannot be read.
        ImportError: pyarrow is not installed.
    """
    with open_table(file) as table:
        for batch in table.batches(table.schema.names, [], NUM_ROWS_AT_ONCE):
            yield from batch.to_pylist()


@contextmanager
def open_table(file: Path) -> "Iterator[Table]":
    """Open a table, whose batches are read inside the block.

    Raises:
        ValueError: it cannot be read.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"{file}: tables are read with pyarrow: {install_line('tables')}") from error
    try:
        yield _Parquet(file) if file.suffix == ".parquet" else _Arrow(file)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; pyarrow's own have no number
            raise
        raise ValueError(f"{file}: not a table that pyarrow reads: {error}") from error


class Table(Protocol):
    """Describes what readers ask of a table file."""

    schema: Any
    """Pyarrow's."""

    def batches(self, plain: Sequence[str], media: Sequence[str], size: int) -> Iterator[Any]:
        """Yield Pyarrow's batches of at most so many rows: some columns whole, and some with media, whose bytes may be
        left out where a cell is an object that holds other things as well.
        """
        ...


class _Parquet:
    def __init__(self, file: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(file, memory_map=True)
        self.schema = self._file.schema_arrow

    def batches(self, plain: Sequence[str], media: Sequence[str], size: int) -> Iterator[Any]:
        leaves = [self._file.schema.column(number).path for number in range(len(self._file.schema))]
        wanted = [leaf for leaf in leaves if leaf.split(".")[0] in plain]
        for name in media:
            leaves_of_column = [leaf for leaf in leaves if leaf.split(".")[0] == name]
            # Any key beside the bytes says as well whether a cell is empty, and is much smaller.
            wanted += [leaf for leaf in leaves_of_column if not leaf.endswith(".bytes")] or leaves_of_column
        yield from self._file.iter_batches(batch_size=size, columns=wanted, use_threads=False)


class _Arrow:
    def __init__(self, file: Path) -> None:
        from pyarrow import ipc, memory_map

        self._file = file
        self.schema = ipc.open_stream(memory_map(str(file))).schema

    def batches(self, plain: Sequence[str], media: Sequence[str], size: int) -> Iterator[Any]:
        from pyarrow import ipc, memory_map

        with memory_map(str(self._file)) as source:
            for batch in ipc.open_stream(source):
                for start in range(0, batch.num_rows, size):
                    yield batch.slice(start, size).select([*plain, *media])


def _is_of(file: Path, split: str) -> bool:
    if file.suffix == ".parquet" and (file.stem == split or file.name.startswith(f"{split}-")):
        return True
    if (stated := _stated_split(file)) is not None:
        return file.name.startswith(("data-", "dataset")) and stated == split
    cached = _OF_CACHE.fullmatch(file.stem) if file.suffix == ".arrow" else None
    return file.parent.name == split or (cached is not None and cached[1] == split)


def _stated_split(file: Path) -> str | None:
    """Return what the state beside an arrow file calls its split; "" where there is a state that names none."""
    state = file.parent / "state.json"
    if file.suffix != ".arrow" or not state.is_file():
        return None
    return json.loads(state.read_text(encoding="utf-8")).get("_split") or ""


def _split_of(file: Path, folder: Path) -> str | None:
    """Return a split under which `_is_of` finds a file of this folder; None where nothing names one."""
    if (stated := _stated_split(file)) is not None:
        return stated or None
    named = (_OF_PARQUET if file.suffix == ".parquet" else _OF_CACHE).fullmatch(file.stem)
    if named is not None:
        return next(name for name in named.groups() if name is not None)
    # The folder that is read was named by whoever reads it.
    return file.parent.name if file.parent != folder and _OF_FOLDER.fullmatch(file.parent.name) else None
