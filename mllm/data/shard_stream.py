"""Reads the samples of many tars or tables one after the other, for ever, without listing them first.

    slot        one of `num_slots` streams that share the shards; every shard of an epoch is read by one of them
    unit        a shard; where there are fewer shards than slots, one of several parts of a shard, every n-th sample
    position    the number of a unit, counted over all epochs, and of a sample in it

The units of an epoch are shuffled by (seed, epoch), and slot s takes the units s, s + num_slots, ... of one epoch after
the other. So no sample of an epoch is read twice or left out, no slot falls behind, and where a stream is says all that
there is to know about it: it can begin anywhere. Shards of a hub are fetched when their turn comes, and read from then
on as those of a disk.

Knows shards and a seed. Does not know processes, batches or tokens.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mllm.config.data import ReaderConfig
from mllm.data.conversations import FORMS, ConversationReader
from mllm.data.findings import Listing
from mllm.data.hub import HubListing, HubShard
from mllm.data.hub_cache import HubCache
from mllm.data.manifest import Sample
from mllm.data.shard_names import shard_files
from mllm.data.shards import tar_samples
from mllm.data.skipped import SkippedSample
from mllm.data.source_files import relative_to
from mllm.data.tables import find_tables, table_samples
from mllm.utils.random_generator import random_generator

SamplesOf = Callable[[Path, str, ConversationReader], Iterator[tuple[str, Callable[[], Sample]]]]
"""Yields what a shard holds, in order: a name of each sample, and what makes it. Given the file, its path below the
root, and what reads its rows."""


class Position(NamedTuple):
    """Says where a stream is: the number of a unit, over all epochs, and how many samples of it came before."""

    unit: int
    row: int


class StreamedSample(NamedTuple):
    """Holds what stands at one position: a sample, or why there is none."""

    position: Position
    epoch: int
    sample: Sample | SkippedSample


@dataclass(frozen=True, slots=True)
class LocalShard:
    """Names a file of a disk, and the folder that its samples name their media from."""

    file: Path
    root: Path

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return self.file.as_posix()

    @property
    def num_bytes(self) -> int:
        """Look up its size.

        Raises:
            OSError: it is not there any more.
        """
        return self.file.stat().st_size


@dataclass(frozen=True)
class Shards:
    """Holds the shards of a stream, each once and in order.

    Args:
        samples_of: see `SamplesOf`.
        commits: of the data sets of a hub among them, by the names that they were given.
        hub_cache: fetches those of a hub.
    """

    shards: Sequence[LocalShard | HubShard]
    samples_of: SamplesOf
    commits: Mapping[str, str] = field(default_factory=dict)
    hub_cache: HubCache | None = None

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        root: str | None,
        reader: ReaderConfig,
        *,
        listings: Mapping[str, HubListing] | None = None,
        hub_cache: HubCache | None = None,
    ) -> "Shards":
        """Find the shards that names and patterns stand for.

        Args:
            names: files, folders and patterns of a disk (see `shard_files`), and those of a hub (see `hub.py`).
            root: that of `default_root` when None. Data of a hub lie below a folder of their own.
            listings: what the hub lists, by name; every name of a hub must be there.
            hub_cache: the hub's own when None.

        Raises:
            ValueError, OSError: as `shard_files` and `find_tables`; or a shard that is named twice.
        """
        listings = listings or {}
        found: dict[str, LocalShard | HubShard] = {}
        for name in names:
            shards = listings[name].shards if name in listings else _found(name, root, reader)
            for shard in shards:
                if shard.name in found:
                    raise ValueError(f"data.train names {shard.name} twice")
                found[shard.name] = shard
        samples_of = tar_samples if reader.format == "webdataset" else table_samples
        commits = {name: listing.commit for name, listing in listings.items()}
        return cls(list(found.values()), samples_of, commits, (hub_cache or HubCache()) if listings else None)

    def facts(self) -> dict[str, Any]:
        """Count the shards and make a digest of names and sizes: another list of shards makes another stream.

        Raises:
            OSError: a shard of a disk is not there any more.
        """
        sizes = [[shard.name, shard.num_bytes] for shard in self.shards]
        facts = {"shards": len(sizes), "sha256": hashlib.sha256(repr(sizes).encode()).hexdigest()}
        return {**facts, "commits": dict(self.commits)} if self.commits else facts

    def samples(
        self,
        seed: int,
        *,
        slot: int = 0,
        num_slots: int = 1,
        start: Position | None = None,
        num_epochs: int | None = None,
        num_ahead: int = 0,
    ) -> "SlotReader":
        """Read what a slot reads; a sample or shard that cannot be used comes as a `SkippedSample`.

        Args:
            start: goes on there; what comes before in the same shard is passed over without being read.
            num_epochs: ends after so many; never when None.
            num_ahead: fetches so many shards of a hub before their turn.

        Raises:
            ValueError, OSError: of a hub's shard that cannot be had, when its turn comes; see `HubCache`.
        """
        units = self._units(seed, start or Position(slot, 0), num_slots, num_epochs)
        return SlotReader(self, units, num_ahead)

    def _units(self, seed: int, start: Position, num_slots: int, num_epochs: int | None) -> "Iterator[_Unit]":
        """Yield what a slot reads, one after the other."""
        num_parts = -(-num_slots // len(self.shards))
        num_units = len(self.shards) * num_parts
        epoch, order = -1, []
        for number in itertools.count(start.unit, num_slots):
            if number // num_units != epoch:
                epoch = number // num_units
                order = random_generator(seed, epoch, "", "shards").permutation(num_units).tolist()
            if num_epochs is not None and epoch >= num_epochs:
                return
            part, index = divmod(order[number % num_units], len(self.shards))
            first_row = start.row if number == start.unit else 0
            yield _Unit(number, epoch, self.shards[index], part, num_parts, first_row)

    def read(self, unit: "_Unit") -> Iterator[StreamedSample]:
        """Yield the samples of one part of a shard from a row on; what is wrong comes in their place.

        An error that ends the whole shard counts as one sample behind those before it.
        """
        shard, listing, row = unit.shard, Listing(), 0
        if isinstance(shard, HubShard):
            assert self.hub_cache is not None
            file, root = self.hub_cache.wait_for(shard)
        else:
            file, root = shard.file, shard.root
        with listing.noting(shard.name, None, "the rest of it is left out"):
            samples = self.samples_of(file, relative_to(root, file), ConversationReader(root, tuple(FORMS)))
            for name, make in itertools.islice(samples, unit.part, None, unit.num_parts):
                if row >= unit.first_row:
                    with listing.noting(shard.name, None, name):
                        yield StreamedSample(Position(unit.number, row), unit.epoch, make())
                    if listing.problems:
                        yield _skipped(listing, name, unit, row)
                row += 1
        if listing.problems and row >= unit.first_row:
            yield _skipped(listing, file.name, unit, row)


class _Unit(NamedTuple):
    """Says which part of which shard is read when, and from which row on."""

    number: int
    epoch: int
    shard: LocalShard | HubShard
    part: int
    num_parts: int
    first_row: int


class SlotReader(Iterator[StreamedSample]):
    """Yields the samples of one slot, and keeps the shards of a hub that they lie in until they are let go.

    Args:
        units: what is read, in order.
        num_ahead: see `Shards.samples`.
    """

    def __init__(self, shards: Shards, units: Iterator[_Unit], num_ahead: int) -> None:
        self.shards, self.units, self.num_ahead = shards, units, num_ahead
        self._held: dict[int, HubShard] = {}
        self._samples = self._all()

    def __next__(self) -> StreamedSample:
        return next(self._samples)

    def let_go_before(self, unit: int) -> None:
        """Say that no media of earlier units are read any more."""
        cache = self.shards.hub_cache
        for number in [number for number in self._held if number < unit]:
            assert cache is not None
            cache.let_go(self._held.pop(number))

    def close(self) -> None:
        """End it, and say that none of its media are read any more."""
        self._samples.close()
        self.let_go_before(max(self._held, default=0) + 1)

    def _all(self) -> Generator[StreamedSample, None, None]:
        upcoming: deque[_Unit] = deque()
        while True:
            upcoming.extend(itertools.islice(self.units, self.num_ahead + 1 - len(upcoming)))
            if not upcoming:
                return
            unit = upcoming.popleft()
            self._hold(unit, upcoming)
            yield from self.shards.read(unit)

    def _hold(self, unit: _Unit, upcoming: Iterable[_Unit]) -> None:
        cache = self.shards.hub_cache
        if isinstance(unit.shard, HubShard):
            assert cache is not None
            cache.hold(unit.shard)
            self._held[unit.number] = unit.shard
        for later in upcoming:
            if isinstance(later.shard, HubShard):
                assert cache is not None
                cache.fetch_ahead(later.shard)


def _skipped(listing: Listing, sample_id: str, unit: _Unit, row: int) -> StreamedSample:
    """Take the one problem off a listing."""
    finding = listing.problems.pop()
    skipped = SkippedSample(sample_id, unit.epoch, "unusable", finding.path, str(finding))
    return StreamedSample(Position(unit.number, row), unit.epoch, skipped)


def _found(name: str, root: str | None, reader: ReaderConfig) -> list[LocalShard]:
    """Return the shards of a disk that a name stands for."""
    if "://" in name or name.startswith("pipe:"):
        raise ValueError(
            f"data.train names {name!r}; of the network only data sets of a hub are read, OWNER/NAME[@REVISION] or "
            "hf://datasets/OWNER/NAME[@REVISION][/PATTERN]"
        )
    files, folder = _files(name, reader)
    return [LocalShard(file, (folder or file.parent) if root is None else Path(root)) for file in files]


def _files(name: str, reader: ReaderConfig) -> tuple[list[Path], Path | None]:
    """Return the files that a name stands for, and the root of a folder."""
    if not os.path.isdir(name):
        return shard_files(name), None
    if reader.format != "webdataset":
        return find_tables(Path(name), reader.split), Path(name)
    if not (files := sorted(Path(name).rglob("*.tar"))):
        raise FileNotFoundError(f"data.train: the folder {name} holds no .tar")
    return files, Path(name)
