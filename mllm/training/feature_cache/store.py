"""Keeps features of media on disk: shards of safetensors, and an index of which sample's media they are of.

Knows files, digests, tensors by key. Does not know encoders, models, manifests' files or how features come about.

    folder/fingerprint.json                     per medium: encoder, transform, augmentation, form; others are refused
    folder/<medium>-<rank>-<number>.safetensors features (T, D) of some items, each under its key
    folder/index-<rank>.jsonl                   one line per sample and version: keys and shards, and the files they are
                                                of; and one line per shard, with the digest of its bytes

A key is a digest of the fingerprint of its medium (transform and encoder) and of what the encoder was fed, so items
whose encoder input is equal (a clip in two tasks, a video under two noises in its audio) are kept once. A file is known
by path, size and time; where the time differs, by a digest of its bytes, so that a copied data set keeps its features.
Shards get their names when they are whole and lines are written after their shards: a kill costs what was not yet
written, at most `SHARD_BYTES` or `FLUSH_SECONDS` of work.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mllm.checkpoints.tensor_files import write_tensors
from mllm.data.manifest import Sample
from mllm.media import MediaError, resolve_media
from mllm.media.limits import digest_of_media
from mllm.media.packed import file_stamp
from mllm.processing.processor import LoadedMedia
from mllm.utils.fail_points import fail_point
from mllm.utils.files import append_text, cut_half_line, digest_of_file, write_text_whole, written_whole

FINGERPRINT = "fingerprint.json"
SHARD_BYTES = 2**27
FLUSH_SECONDS = 60.0


@dataclass(frozen=True)
class KeptItem:
    """Says where the features of one media item are, the raw length they are of, and the file's stamp and digest."""

    medium: str
    shard: str
    key: str
    num_rows: int
    raw_length: int
    stamp: str
    content: str
    grid: Sequence[int] | None = None
    """Rows and columns of an image, where images keep their shape."""


@dataclass(frozen=True)
class Shard:
    """Describes a file of features: how many items and bytes it holds, and the digest of the bytes."""

    name: str
    num_items: int
    num_bytes: int
    digest: str


@dataclass
class FeatureStore:
    """Reads the features in a folder.

    Args:
        folder: of all runs that share them.
        versions: of each sample.
        seed: of the augmentation of each version; None never augments.
        entries: by (sample id, version) the items of the sample in order, or why it cannot be used.
        shards: by name.
        renewed: entries whose files were found to be the same under another time.
    """

    folder: Path
    versions: int = 1
    seed: int | None = 0
    entries: dict[tuple[str, int], list[KeptItem] | str] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    renewed: list[tuple[str, int]] = field(default_factory=list)
    _open: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out open files, for data loader workers that are spawned."""
        return {**self.__dict__, "_open": {}}

    def read_index(self) -> None:
        """Take in what all processes have written."""
        for file in sorted(self.folder.glob("index-*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # the last may be half written
                row = json.loads(line)
                if "shard" in row:
                    self.shards[row["shard"]["name"]] = Shard(**row["shard"])
                else:
                    entry = row["error"] if "error" in row else [KeptItem(**item) for item in row["items"]]
                    self.entries[row["id"], row["version"]] = entry

    def missing(self, samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
        """List the versions of samples that are not there, failed, or are of files that have changed since.

        Entries of files that are the same but for their time take on the new time.
        """
        wanted = []
        for sample in samples:
            files = [_File(sample, part.path) for part in sample.media]
            for version in range(self.versions):
                items = self.entries.get((sample.id, version))
                if items is None or isinstance(items, str) or not _are_of(items, files):
                    wanted.append((sample, version))
                elif any(item.stamp != file.stamp for file, item in zip(files, items, strict=True)):
                    now = [replace(item, stamp=file.stamp) for file, item in zip(files, items, strict=True)]
                    self.entries[sample.id, version] = now
                    self.renewed.append((sample.id, version))
        return wanted

    def load(self, sample: Sample, epoch: int, known: dict[str, LoadedMedia] | None = None) -> list[LoadedMedia]:
        """Load the features of a sample in place of its media, instead of `ElasticProcessor.load_media`.

        Args:
            known: by key what other samples got, which they share; what is new is added.

        Raises:
            ValueError: the sample could not be loaded when its features were made; the reason is that of then.
        """
        items = self.entries[sample.id, epoch % self.versions]
        if isinstance(items, str):
            raise ValueError(items)
        known = {} if known is None else known
        for item in items:
            if item.key not in known:
                grid = (item.grid[0], item.grid[1]) if item.grid else None
                known[item.key] = LoadedMedia(item.medium, self.rows(item).float(), item.raw_length, grid)
        return [known[item.key] for item in items]

    def rows(self, item: KeptItem) -> Tensor:
        """Return an item's features (T, D) as they are kept; mapped from the file, not read until used."""
        if item.shard not in self._open:
            self._open[item.shard] = safe_open(self.folder / item.shard, framework="pt")
        return self._open[item.shard].get_tensor(item.key)


class ShardWriter:
    """Writes the features of one process: shards when enough has come together, then their lines of the index.

    Args:
        store: gets the entries that are written.
        rank: of this process, part of all names.
    """

    def __init__(self, store: FeatureStore, rank: int) -> None:
        self.store = store
        self.rank = rank
        self.index = store.folder / f"index-{rank}.jsonl"
        entries = [entry for entry in store.entries.values() if not isinstance(entry, str)]
        self.known = {item.key: item for items in entries for item in items}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._lines: list[tuple[str, int, Any]] = []
        self._bytes = 0
        self._flushed = time.monotonic()
        for file in store.folder.glob(f".*-{rank}-*.writing"):  # of a kill
            file.unlink()
        cut_half_line(self.index)

    def add_features(self, item: KeptItem, features: Tensor) -> None:
        """Keep one item's features under its key."""
        self._tensors.setdefault(item.medium, {})[item.key] = features.clone()
        self._bytes += features.nbytes
        self.known[item.key] = replace(item, shard="", num_rows=len(features))

    def add_sample(self, sample_id: str, version: int, items: Sequence[KeptItem] | str) -> None:
        """Note a sample whose items are known, or why it cannot be used."""
        self._lines.append((sample_id, version, items))

    def flush_when_due(self) -> None:
        """Write when enough has come together, or has waited long enough."""
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        shards = [self._write(medium, tensors) for medium, tensors in self._tensors.items()]
        self.store.shards |= {shard.name: shard for shard in shards}
        lines = [json.dumps({"shard": asdict(shard)}) + "\n" for shard in shards]
        lines += [self._line(*line) for line in self._lines]
        fail_point("features.shard")
        append_text(self.index, "".join(lines), flush=True)
        fail_point("features.index")
        self._tensors, self._lines, self._bytes, self._flushed = {}, [], 0, time.monotonic()

    def _write(self, medium: str, tensors: Mapping[str, Tensor]) -> Shard:
        number = len(list(self.store.folder.glob(f"{medium}-{self.rank}-*.safetensors")))
        file = self.store.folder / f"{medium}-{self.rank}-{number:05d}.safetensors"
        with written_whole(file) as aside:
            write_tensors(tensors, aside)
            shard = Shard(file.name, len(tensors), aside.stat().st_size, digest_of_file(aside))
        for key in tensors:
            self.known[key] = replace(self.known[key], shard=file.name)
        return shard

    def _line(self, sample_id: str, version: int, items: Sequence[KeptItem] | str) -> str:
        row: dict[str, Any] = {"id": sample_id, "version": version}
        if isinstance(items, str):
            self.store.entries[sample_id, version] = items
            return json.dumps(row | {"error": items}) + "\n"
        written = [self.known[item.key] for item in items]
        kept = [
            replace(item, shard=facts.shard, num_rows=facts.num_rows)
            for item, facts in zip(items, written, strict=True)
        ]
        self.store.entries[sample_id, version] = kept
        return json.dumps(row | {"items": [asdict(item) for item in kept]}) + "\n"


def claim(folder: Path, fingerprint: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a folder hold these features, or see that it does; the features of other media may be there too.

    Args:
        fingerprint: by medium, what its features depend on.

    Raises:
        ValueError: it holds others; what differs is named.
    """
    refuse_others(folder, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_fingerprint(folder)
    text = json.dumps({**before, **_plain(fingerprint)}, indent=1, sort_keys=True) + "\n"
    write_text_whole(folder / FINGERPRINT, text, concurrent=True)


def refuse_others(folder: Path, fingerprint: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a folder that holds features of something else.

    Raises:
        ValueError: what differs is named.
    """
    if words := fingerprint_differences(read_fingerprint(folder), fingerprint):
        raise ValueError(
            f"data.features.folder {folder} holds features of something else ({'; '.join(words)}); choose another"
        )


def read_fingerprint(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what the features of a folder depend on, by medium; empty where there are none yet."""
    file = folder / FINGERPRINT
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def fingerprint_differences(before: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List what differs between the features that are there and those that are wanted, of the media that both have."""
    return [
        f"{medium}.{key} was {before[medium].get(key)!r} and is {facts.get(key)!r}"
        for medium, facts in _plain(now).items()
        if medium in before
        for key in sorted(before[medium].keys() | facts.keys())
        if before[medium].get(key) != facts.get(key)
    ]


def key_of(item: LoadedMedia, fingerprint: Mapping[str, Any]) -> str:
    """Name an item's features by what its encoder is fed with, and by the encoder."""
    digest = hashlib.blake2b(json.dumps(_plain(fingerprint), sort_keys=True).encode(), digest_size=16)
    shape = f"{tuple(item.values.shape)} {item.grid} {item.values.dtype}"
    digest.update(f"{item.medium} {item.raw_length} {shape}".encode())
    digest.update(item.values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kept_items(sample: Sample, loaded: Sequence[LoadedMedia], keys: Sequence[str]) -> list[KeptItem]:
    """Describe the items of a sample for the index; where their features are is filled in when they are written."""
    files = [_File(sample, part.path) for part in sample.media]
    return [
        KeptItem(item.medium, "", key, 0, item.raw_length, file.stamp, file.content(), item.grid)
        for item, key, file in zip(loaded, keys, files, strict=True)
    ]


@dataclass
class _File:
    """Describes a media file of a sample, as it is now."""

    sample: Sample
    path: str
    stamp: str = ""
    _content: str | None = None

    def __post_init__(self) -> None:
        try:
            facts = file_stamp(str(resolve_media(self.sample.root, self.path)))
        except MediaError:
            facts = None
        self.stamp = "none" if facts is None else f"{self.path} {facts[0]} {facts[1]}"

    def content(self) -> str:
        """Compute a digest of its bytes; empty where it cannot be read."""
        if self._content is None:
            try:
                self._content = digest_of_media(resolve_media(self.sample.root, self.path))
            except (OSError, MediaError):
                self._content = ""
        return self._content

    def is_that_of(self, item: KeptItem) -> bool:
        """Tell whether an entry was made of this file; its bytes are looked at only where only its time differs."""
        if item.stamp == self.stamp:
            return True
        same_size = item.stamp.rpartition(" ")[0] == self.stamp.rpartition(" ")[0]
        return same_size and item.content != "" and item.content == self.content()


def _are_of(items: Sequence[KeptItem], files: Sequence[_File]) -> bool:
    return len(items) == len(files) and all(file.is_that_of(item) for file, item in zip(files, items, strict=True))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back."""
    return json.loads(json.dumps(dict(values), default=str))


def missing_keys(store: FeatureStore) -> Iterator[tuple[tuple[str, int], KeptItem, str]]:
    """Yield entries whose features are not where the index says, or not of the size it says, and why."""
    shapes: dict[str, dict[str, int] | str] = {}
    for name in {item.shard for items in store.entries.values() if not isinstance(items, str) for item in items}:
        try:
            with safe_open(store.folder / name, framework="pt") as file:
                shapes[name] = {key: file.get_slice(key).get_shape()[0] for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # whatever is wrong with the file
            shapes[name] = f"{name} cannot be read: {error}"
    for key, items in store.entries.items():
        for item in items if not isinstance(items, str) else []:
            num_rows = shapes[item.shard]
            if isinstance(num_rows, str):
                yield key, item, num_rows
            elif num_rows.get(item.key) != item.num_rows:
                yield key, item, f"{item.shard} holds {num_rows.get(item.key, 'no')} rows of it, not {item.num_rows}"
