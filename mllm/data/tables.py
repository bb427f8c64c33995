"""Reads tables of conversations with their media inside: parquet files, and what Hugging Face `datasets` keeps or hubs
hold.

Rows are read without their media, which stay where they are and are read when a sample is loaded (media/packed.py).

Knows columns, and which of them hold media. Does not decode media, and runs no code of a data set.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm.config.data import ReaderConfig
from mllm.data.conversations import FORMS, ConversationReader
from mllm.data.findings import Listing, renumbered
from mllm.data.hub import CONVERTED, HUB_NAME, root_of_snapshot
from mllm.data.json_files import stated_id
from mllm.data.json_lines import read_object
from mllm.data.manifest import Sample
from mllm.data.source_files import relative_to
from mllm.data.table_files import Table, all_tables, chosen_tables, is_table, open_table
from mllm.media.packed import packed_path

_NAMES = {
    "image": ("image", "image", "img", "jpg", "jpeg", "png", "webp"),
    "audio": ("audio", "sound", "speech", "wav", "flac", "mp3"),
    "video": ("video", "clip", "mp4"),
}
_FEATURES = {"Image": "image", "Audio": "audio", "Video": "video"}
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class MediaColumn:
    """Names a column with media: its name and number, which medium, and whether a cell is a list of them."""

    name: str
    number: int
    medium: str
    is_list: bool


def read_parquet(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read a table, or those of a split in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    listing = Listing()
    reader = ConversationReader(root, tuple(FORMS))
    for file in find_tables(source, config.split):
        with listing.noting(file):
            for name, make in table_samples(file, relative_to(root, file), reader):
                with listing.noting(file, None, name):
                    listing.samples.append(renumbered(make(), reader.times_seen))
    reader.log(source)
    return listing


def read_datasets(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read a folder that `save_to_disk` left, a downloaded data set, or one of a hub by its name OWNER/NAME[@REVISION].

    Of a hub only tables are fetched, never a script; their paths are relative to the folder the cache keeps them in.

    Raises:
        FileNotFoundError: no such folder, and no name of a hub; or there is no table in it.
        OSError: the hub cannot be reached, or has no such data set.
    """
    if not _is_of_hub(source):
        return read_parquet(source, root, config)
    folder = _fetched(source.as_posix())
    return read_parquet(folder, root_of_snapshot(folder, all_tables(folder)), config)


def _is_of_hub(source: Path) -> bool:
    return not source.exists() and HUB_NAME.fullmatch(source.as_posix()) is not None


def _fetched(name: str) -> Path:
    """Fetch a hub's data set to the cache; where no revision is named and it holds no table, the hub's own conversion
    of it.

    The conversion is of the newest revision, so it never stands for one that is named.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    for wanted in (revision,) if revision else (None, CONVERTED):
        try:
            fetched = snapshot_download(repository, repo_type="dataset", revision=wanted, allow_patterns=["*.parquet"])
        except OSError as error:  # a folder that is not there looks like a name of the hub as well
            problem = f"{name}: there is no such folder, and a data set of that name cannot be had of the hub"
            raise FileNotFoundError(f"{problem}: {error}") from error
        folder = Path(fetched)
        if is_table(folder):
            return folder
    hint = f"; the hub's conversion of the newest one is {repository}@{CONVERTED}" if revision else ""
    raise FileNotFoundError(f"{name} holds no parquet{hint}")


def find_tables(source: Path, split: str | None) -> list[Path]:
    """Return the tables of a split, see `chosen_tables`; the source itself where it is a file.

    Raises:
        FileNotFoundError: there is none, or no such file or folder.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    return [source] if source.is_file() else chosen_tables(all_tables(source), source, split)


def table_samples(file: Path, relative: str, reader: ConversationReader) -> Iterator[tuple[str, Callable[[], Sample]]]:
    """Yield which row of a table it is, in order, and what makes its sample; media are not read.

    Args:
        relative: the path of the table below the reader's root.

    Raises:
        ValueError: it cannot be read; what is made raises one where a row is no sample.
        ImportError: pyarrow is not installed.
    """
    with open_table(file) as table:
        columns = list(_media_columns(table.schema, reader))
        plain = [name for name in table.schema.names if name not in {column.name for column in columns}]
        for number, (row, shapes) in enumerate(_rows(table, plain, columns)):
            media: dict[str, list[str]] = {}
            for column, shape in zip(columns, shapes, strict=True):
                media.setdefault(column.medium, []).extend(_paths(relative, number, column, shape))
            yield f"row {number}", partial(_sample_of, row, f"{file.stem}-{number}", media, reader)


def _sample_of(row: dict[str, Any], default_id: str, media: dict[str, list[str]], reader: ConversationReader) -> Sample:
    row = {key: _unwritten(value, key) for key, value in row.items()}
    return reader.sample_of(row, stated_id(row, default_id), media)


def _unwritten(value: Any, key: str) -> Any:
    """Return a value, decoded where it is a conversation that a table keeps as a text of JSON."""
    if key in ("messages", "conversations") and isinstance(value, str):
        return read_object(value.encode("utf-8"))
    return value


def _paths(relative: str, row: int, column: MediaColumn, shape: int | None) -> list[str]:
    """Return the paths of a cell's media."""
    if shape is None:
        return []
    if not column.is_list:
        return [packed_path(relative, row, column.number)]
    return [packed_path(relative, row, column.number, index) for index in range(shape)]


def _rows(table: Table, plain: list[str], columns: list[MediaColumn]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield rows without their media, and of each cell of media how many it holds, None for a cell that is empty."""
    # Media are counted and never copied: their bytes would fill the memory long before all rows are read.
    for batch in table.batches(plain, [column.name for column in columns], _ROWS_AT_ONCE):
        texts = batch.select(plain).to_pylist() if plain else [{} for _ in range(batch.num_rows)]
        shapes = [_shapes(batch.column(column.name), column.is_list) for column in columns]
        yield from ((row, [counts[number] for counts in shapes]) for number, row in enumerate(texts))


def _shapes(cells: Any, is_list: bool) -> list[int | None]:
    if is_list:
        return cells.value_lengths().to_pylist()
    return [1 if valid else None for valid in cells.is_valid().to_pylist()]


def _media_columns(schema: Any, reader: ConversationReader) -> Iterator[MediaColumn]:
    """Yield columns of bytes, and of objects with bytes; the features that `datasets` notes, or else names, say of
    what.
    """
    features = _features(schema)
    for number, field in enumerate(schema):
        kind, is_list = field.type, False
        if _is_list(kind):
            kind, is_list = kind.value_type, True
        if not _holds_bytes(kind):
            continue
        medium = features.get(field.name) or _medium_of(field.name)
        if medium is None:
            reader.unread[field.name] += 1
            continue
        yield MediaColumn(field.name, number, medium, is_list)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    if types.is_dictionary(kind):  # each value once, and its number in every cell that holds it
        return _holds_bytes(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _features(schema: Any) -> dict[str, str]:
    """Return the medium of each column that the notes of `datasets` call an Image, Audio or Video, or a list of
    them.
    """
    notes = (schema.metadata or {}).get(b"huggingface")
    if notes is None:
        return {}
    features = json.loads(notes).get("info", {}).get("features", {})
    return {name: medium for name, feature in features.items() if (medium := _medium_in(feature)) is not None}


def _medium_in(feature: Any) -> str | None:
    if isinstance(feature, list):
        return _medium_in(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    return _FEATURES.get(str(feature.get("_type"))) or _medium_in(feature.get("feature"))


def _medium_of(name: str) -> str | None:
    plain = re.sub(r"(_?\d+|_bytes|_data)$", "", name.lower())
    called = {plain, plain.removesuffix("s")}
    return next((medium for medium, names in _NAMES.items() if called & set(names)), None)
