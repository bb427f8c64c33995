"""Reads the samples of many tars or tables one after the other, for ever, without listing them first.

    slot        one of `num_slots` streams that share the shards; every shard of an epoch is read by one of them
    unit        a shard; where there are fewer shards than slots, one of several parts of a shard, every n-th sample
    position    the number of a unit, counted over all epochs, and of a sample in it

The units of an epoch are shuffled by (seed, epoch), and slot s takes the units s, s + num_slots, ... of one epoch after
the other. So no sample of an epoch is read twice or left out, no slot falls behind, and where a stream is says all that
there is to know about it: it can begin anywhere.

Knows files and a seed. Does not know processes, batches or tokens.
"""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mllm.config.data import ReaderConfig
from mllm.data.conversations import FORMS, ConversationReader
from mllm.data.findings import Listing, first_lines
from mllm.data.manifest import Sample
from mllm.data.shards import tar_samples
from mllm.data.skipped import SkippedSample
from mllm.data.source_files import relative_to
from mllm.data.tables import find_tables, table_samples
from mllm.utils.random_generator import random_generator

_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^{}]*\{")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
MAX_SHARDS = 1_000_000
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


@dataclass(frozen=True)
class Shards:
    """Holds the files of a stream, each once and in order.

    Args:
        roots: by file, the folder that its samples name their media from.
        samples_of: see `SamplesOf`.
    """

    roots: Mapping[Path, Path]
    samples_of: SamplesOf

    @classmethod
    def of(cls, names: Sequence[str], root: str | None, reader: ReaderConfig) -> "Shards":
        """Find the files that names and patterns stand for.

        Args:
            names: files, folders, patterns (see `shard_files`), or of the format datasets data sets of a hub.
            root: that of `default_root` when None.

        Raises:
            ValueError, OSError: as `shard_files` and `find_tables`; or a file that is named twice.
        """
        roots: dict[Path, Path] = {}
        for name in names:
            files, default = _found(name, reader)
            for file in files:
                if file in roots:
                    raise ValueError(f"data.train names {file} twice")
                roots[file] = (default or file.parent) if root is None else Path(root)
        return cls(roots, tar_samples if reader.format == "webdataset" else table_samples)

    @cached_property
    def files(self) -> list[Path]:
        """List the files."""
        return list(self.roots)

    def facts(self) -> dict[str, Any]:
        """Count the shards and make a digest of names and sizes: another list of shards makes another stream.

        Raises:
            OSError: a shard is not there any more.
        """
        sizes = [[file.as_posix(), file.stat().st_size] for file in self.files]
        return {"shards": len(sizes), "sha256": hashlib.sha256(repr(sizes).encode()).hexdigest()}

    def samples(
        self,
        seed: int,
        *,
        slot: int = 0,
        num_slots: int = 1,
        start: Position | None = None,
        num_epochs: int | None = None,
    ) -> Iterator[StreamedSample]:
        """Yield what a slot reads; a sample or shard that cannot be used comes as a `SkippedSample`.

        Args:
            start: goes on there; what comes before in the same shard is passed over without being read.
            num_epochs: ends after so many; never when None.
        """
        num_parts = -(-num_slots // len(self.files))
        num_units = len(self.files) * num_parts
        position = start or Position(slot, 0)
        epoch, order = -1, []
        for number in itertools.count(position.unit, num_slots):
            if number // num_units != epoch:
                epoch = number // num_units
                order = random_generator(seed, epoch, "", "shards").permutation(num_units).tolist()
            if num_epochs is not None and epoch >= num_epochs:
                return
            part, index = divmod(order[number % num_units], len(self.files))
            first_row = position.row if number == position.unit else 0
            for row, sample in self._read(self.files[index], part, num_parts, epoch, first_row):
                yield StreamedSample(Position(number, row), epoch, sample)

    def _read(
        self, file: Path, part: int, num_parts: int, epoch: int, first_row: int
    ) -> Iterator[tuple[int, Sample | SkippedSample]]:
        """Yield the samples of one part of a shard from a row on, with their rows; what is wrong comes in their place.

        An error that ends the whole shard counts as one sample behind those before it.
        """
        root, listing, row = self.roots[file], Listing(), 0
        with listing.noting(file, None, "the rest of it is left out"):
            samples = self.samples_of(file, relative_to(root, file), ConversationReader(root, tuple(FORMS)))
            for name, make in itertools.islice(samples, part, None, num_parts):
                if row >= first_row:
                    with listing.noting(file, None, name):
                        yield row, make()
                    if listing.problems:
                        yield row, _skipped(listing, name, epoch)
                row += 1
        if listing.problems and row >= first_row:
            yield row, _skipped(listing, file.name, epoch)


def _skipped(listing: Listing, sample_id: str, epoch: int) -> SkippedSample:
    """Take the one problem off a listing."""
    finding = listing.problems.pop()
    return SkippedSample(sample_id, epoch, "unusable", finding.path, str(finding))


def _found(name: str, reader: ReaderConfig) -> tuple[list[Path], Path | None]:
    """Return the shards that a name stands for, and the root of a folder."""
    if "://" in name or name.startswith("pipe:"):
        raise ValueError(f"data.train names {name!r}; nothing is fetched from the network: name files of a disk")
    if reader.format == "webdataset":
        if not os.path.isdir(name):
            return shard_files(name), None
        if not (files := sorted(Path(name).rglob("*.tar"))):
            raise FileNotFoundError(f"data.train: the folder {name} holds no .tar")
        return files, Path(name)
    if os.path.isfile(name) or _BRACES.search(name) or _WILD.search(name):
        return shard_files(name), None
    return find_tables(Path(name), reader)


def shard_files(name: str) -> list[Path]:
    """Return the files that a name stands for: itself, or those of a pattern.

    Args:
        name: `*`, `?` and `[...]` stand for what is there; {a,b} and {000..099} for names each of which must be there.

    Raises:
        ValueError: braces inside braces, or a pattern that makes too many names.
        FileNotFoundError: there is no such file, or one of several is not there.
    """
    files = []
    missing = []
    for one in [name] if os.path.isfile(name) else _expanded(name):
        matches = sorted(glob.glob(one, recursive=True)) if _WILD.search(one) and not os.path.isfile(one) else [one]
        files += matches
        missing += [one] if not matches else [match for match in matches if not os.path.isfile(match)]
    if missing:
        raise FileNotFoundError("data.train: there is no such shard:\n" + "\n".join(first_lines(missing)))
    return [Path(file) for file in files]


def _expanded(name: str) -> list[str]:
    """Write out the braces of a name."""
    if _NESTED.search(name):
        raise ValueError(f"data.train: {name} holds braces inside braces; write them apart")
    names = [name]
    while match := _BRACES.search(names[0]):
        values = _values(match[1])
        if len(names) * len(values) > MAX_SHARDS:
            raise ValueError(f"data.train: {name} stands for more than {MAX_SHARDS} names")
        names = [_BRACES.sub(lambda _, value=value: value, one, count=1) for one in names for value in values]
    return names


def _values(inside: str) -> list[str]:
    if span := _RANGE.fullmatch(inside):
        first, last = int(span[1]), int(span[2])
        # Zeros in front say how long a number is, as in a shell.
        width = max(map(len, span.groups())) if any(len(end) > 1 and end[0] == "0" for end in span.groups()) else 0
        step = 1 if last >= first else -1
        if abs(last - first) >= MAX_SHARDS:
            raise ValueError(f"data.train: {{{inside}}} stands for more than {MAX_SHARDS} names")
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return inside.split(",")
