"""Reads media files that stand inside another file: a member of a tar, or a cell of a parquet or arrow table.

    shards/000.tar@1536.20480         20480 bytes from byte 1536 on
    data/train-0.parquet@17.2         row 17, column 2
    data/train-0.parquet@17.2.0       the first of the list there

Such a path goes wherever that of a file does. Bytes are read when they are asked for, into memory and nowhere else;
nothing is unpickled, and pyarrow, which reads tables, is imported when one is opened.

Knows bytes, rows and columns. Does not decode media.
"""

import os
import re
from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple

from mllm.media.errors import MediaError, too_many_bytes
from mllm.media.regular import open_regular
from mllm.utils.extras import install_line

_PACKED = re.compile(r"(?P<file>.+\.(?P<kind>tar|parquet|arrow))@(?P<numbers>\d{1,18}\.\d{1,18}(?:\.\d{1,18})?)")
MAX_CHUNK_BYTES = 2**30
"""Largest column of a row group that is unpacked to take one cell from it."""


class Packed(NamedTuple):
    """Names a place inside a file: of a tar (first byte, length), of a table (row, column, place in a list)."""

    file: str
    kind: str
    numbers: tuple[int, ...]


def packed_location(path: str) -> Packed | None:
    """Return the place that a path means, or None where it is that of a file."""
    match = _PACKED.fullmatch(path) if "@" in path else None
    if match is None:
        return None
    return Packed(match["file"], match["kind"], tuple(int(number) for number in match["numbers"].split(".")))


def packed_path(file: str, *numbers: int) -> str:
    """Return the path of a place inside a file."""
    return f"{file}@{'.'.join(map(str, numbers))}"


def file_stamp(path: str) -> tuple[int, int] | None:
    """Return size and time, in nanoseconds, of a medium's file, or of the one it stands in; None where there is none.

    It opens nothing, and says the same of a file that reading would refuse.
    """
    location = None if os.path.lexists(path) else packed_location(path)
    try:
        facts = os.stat(path if location is None else location.file)
    except (OSError, ValueError):  # reading says what is wrong with it
        return None
    return facts.st_size, facts.st_mtime_ns


def packed_bytes(name: str, location: Packed, max_bytes: int, key: str | None = None) -> bytes:
    """Read the bytes of a place.

    Args:
        name: the path, for messages.
        max_bytes: more are refused, of a tar before they are read.
        key: the limit's name, for the message.

    Raises:
        MediaError: missing, refused, unsupported (pyarrow is not installed), corrupt, empty, or limit.
    """
    content = _from_tar(name, location, max_bytes, key) if location.kind == "tar" else _from_table(name, location)
    if not content:
        raise MediaError("empty", name, "the file is empty")
    if len(content) > max_bytes:
        raise too_many_bytes(name, max_bytes, key)
    return content


def _from_tar(name: str, location: Packed, max_bytes: int, key: str | None) -> bytes:
    if len(location.numbers) != 2:
        raise MediaError("missing", name, "a place in a tar is its first byte and its length")
    start, size = location.numbers
    if size > max_bytes:
        raise too_many_bytes(name, max_bytes, key)
    descriptor = open_regular(name, location.file)
    try:
        if start + size > os.fstat(descriptor).st_size:
            raise MediaError("missing", name, "the tar ends before that place")
        content = os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)
    if len(content) != size:
        raise MediaError("corrupt", name, "the tar could not be read")
    return content


def _from_table(name: str, location: Packed) -> bytes:
    """Read the bytes of a cell: binary, or an object with them as hubs keep images and audio."""
    try:
        import pyarrow
    except ImportError as error:
        reason = f"tables are read with pyarrow: {install_line('tables')}"
        raise MediaError("unsupported", name, reason) from error
    row, column, *item = location.numbers
    os.close(open_regular(name, location.file))
    try:
        facts = os.stat(location.file)
        cell = _cell(location.file, (facts.st_mtime_ns, facts.st_size, os.getpid()), row, column)
    except IndexError as error:
        raise MediaError("missing", name, "the table has no such row or column") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise MediaError("corrupt", name, "not a table that pyarrow reads") from error
    value = cell.as_py()
    if item:
        if not isinstance(value, list) or item[0] >= len(value):
            raise MediaError("missing", name, "the table has nothing at that place of the list")
        value = value[item[0]]
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise MediaError("missing", name, "the table names a file there and does not hold it")
    return value


def _cell(file: str, stamp: tuple[int, ...], row: int, column: int) -> Any:
    """Read a cell of a table; what it was taken from is kept for the next one."""
    for number, (first, count) in enumerate(_parts(file, stamp)):
        if first <= row < first + count:
            return _column(file, stamp, number, column)[row - first]
    raise IndexError(row)


# The process is part of a stamp: files that a forked worker shares with others have one position for all.
@lru_cache(maxsize=64)
def _parts(file: str, stamp: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return the first row and the number of rows of each row group of a parquet file, or of each batch of an arrow
    file.
    """
    if file.endswith(".parquet"):
        facts = _parquet(file, stamp).metadata
        counts = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    else:
        counts = [batch.num_rows for batch in _batches(file)]
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    return tuple(zip(firsts, counts, strict=True))


@lru_cache(maxsize=2)
def _column(file: str, stamp: tuple[int, ...], part: int, column: int) -> Any:
    """Read one column of a row group or a batch."""
    if file.endswith(".arrow"):
        batch = next(batch for number, batch in enumerate(_batches(file)) if number == part)
        return batch.column(column)
    table = _parquet(file, stamp)
    name = table.schema_arrow.names[column]
    group = table.metadata.row_group(part)
    # Parquet stores an object's keys as columns of their own; all those of this one are unpacked together.
    leaves = (group.column(number) for number in range(group.num_columns))
    size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == name)
    if size > MAX_CHUNK_BYTES:
        reason = f"a row group holds {size} bytes of the column {name}, more than {MAX_CHUNK_BYTES}"
        raise MediaError("limit", file, f"{reason}; write the table with smaller ones")
    return table.read_row_group(part, columns=[name], use_threads=False).column(0)


_opened: deque[str] = deque(maxlen=8)


@lru_cache(maxsize=8)
def _parquet(file: str, stamp: tuple[int, ...]) -> Any:
    from pyarrow import parquet

    # A file that was deleted takes its place on the disk as long as it is open.
    if not all(map(os.path.exists, _opened)):
        for opened in (_column, _parquet):
            opened.cache_clear()
        _opened.clear()
    _opened.append(file)
    return parquet.ParquetFile(file, memory_map=True)


def _batches(file: str) -> Any:
    from pyarrow import ipc, memory_map

    return ipc.open_stream(memory_map(file))
