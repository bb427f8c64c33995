"""Tables as hubs hand them out, to rows: parquet files, or the arrow files that `save_to_disk` of datasets leaves.

    data/validation-00000-of-00001.parquet   by name, in any folder; or validation/0000.parquet, by folder
    validation/data-00000-of-00001.arrow     of several splits; one alone lies with a state.json that names it

Knows files, splits and pyarrow, which is imported when a table is opened. Does not know what columns mean.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mllm.extras import install_line

SUFFIXES = (".parquet", ".arrow")
NUM_ROWS_AT_ONCE = 64
"""Rows hold pictures."""


def is_table(source: Path) -> bool:
    """Whether the source is a table, or a folder with tables somewhere in it."""
    if source.is_file():
        return source.suffix in SUFFIXES
    return any(next(source.rglob(f"*{suffix}"), None) is not None for suffix in SUFFIXES)


def table_files(source: Path, split: str, *, inside: Sequence[str] = ()) -> list[Path]:
    """The files of a split, in order; the source itself where it is a file.

    Args:
        inside: folders that are looked into alone where one of them is there, as a hub's data set may hold several.

    Raises:
        FileNotFoundError: there is none.
    """
    if source.is_file():
        return [source]
    folder = next((source / name for name in inside if (source / name).is_dir()), source)
    found = [file for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}") if _is_of(file, split)]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no table of the split {split}; looked for {split}-*.parquet, {split}/*.parquet and "
            f"{split}/*.arrow"
        )
    return sorted(found)


def table_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table.

    Raises:
        ValueError: it cannot be read.
        ImportError: pyarrow is not installed.
    """
    with open_table(file) as table:
        for batch in table.batches(table.schema.names, [], NUM_ROWS_AT_ONCE):
            yield from batch.to_pylist()


@contextmanager
def open_table(file: Path) -> "Iterator[Table]":
    """A table, whose batches are read inside the block.

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
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file}: not a table that pyarrow reads: {error}") from error


class Table(Protocol):
    """What is asked of a table file."""

    schema: Any
    """Pyarrow's."""

    def batches(self, plain: Sequence[str], media: Sequence[str], size: int) -> Iterator[Any]:
        """Pyarrow's batches of at most so many rows: some columns whole, and some with media, whose bytes may be left
        out where a cell is an object that holds other things as well."""
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
            own = [leaf for leaf in leaves if leaf.split(".")[0] == name]
            wanted += [leaf for leaf in own if not leaf.endswith(".bytes")] or own
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
    state = file.parent / "state.json"
    if file.suffix == ".arrow" and state.is_file():
        return file.name.startswith(("data-", "dataset")) and json.loads(state.read_text()).get("_split") == split
    return file.parent.name == split
