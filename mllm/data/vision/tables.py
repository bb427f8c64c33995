"""Tables as hubs hand them out, to rows: parquet files, or the arrow files that `save_to_disk` of datasets leaves.

    data/validation-00000-of-00001.parquet   by name, in any folder; or validation/0000.parquet, by folder
    validation/data-00000-of-00001.arrow     of several splits; one alone lies with a state.json that names it

Knows files, splits and pyarrow, which is imported when a table is opened. Does not know what columns mean.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
        ValueError: it cannot be read, or pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{file}: tables are read with pyarrow: {install_line('tables')}") from error
    try:
        for batch in _batches(file):
            for start in range(0, batch.num_rows, NUM_ROWS_AT_ONCE):
                yield from batch.slice(start, NUM_ROWS_AT_ONCE).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a table that pyarrow reads: {error}") from error


def _is_of(file: Path, split: str) -> bool:
    if file.suffix == ".parquet" and (file.stem == split or file.name.startswith(f"{split}-")):
        return True
    state = file.parent / "state.json"
    if file.suffix == ".arrow" and state.is_file():
        return file.name.startswith(("data-", "dataset")) and json.loads(state.read_text()).get("_split") == split
    return file.parent.name == split


def _batches(file: Path) -> Iterator[Any]:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=NUM_ROWS_AT_ONCE)
        return
    from pyarrow import ipc, memory_map

    with memory_map(str(file)) as source:
        yield from ipc.open_stream(source)
