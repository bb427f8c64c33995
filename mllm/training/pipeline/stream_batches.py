"""Makes the micro-batches of a process from a stream of samples, whose number nobody knows.

    slot     the micro-batches that have one place in every step; processes x accumulation of them share the shards
    pool     `shuffle_samples` samples of a slot that follow each other; their batches come in random order

A pool is cut into batches of similar length, and nothing of it is left for the next one. So its batches are a function
of the seed and of the position that it begins at. These positions are noted in the run folder, and a run that is
resumed begins with the pool it was in; without the notes it makes all pools again and ends up at the same place.

Batches hold texts and say where media lie; the processes that load them get them from the one that plans. So a shard
is let go when the batches of the last pool with samples of it are loaded, which shows by how many were chosen since.

Knows samples, their tokens and the `data` block of a run config. Does not load media.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, repeat
from pathlib import Path

from torch.utils.data import Dataset, Sampler

from mllm.config.run import DataConfig
from mllm.data.batching import SampleKey
from mllm.data.dataset import MAX_SUBSTITUTES, Item, Load, ManifestDataset
from mllm.data.manifest import Sample
from mllm.data.shard_stream import Position, Shards, StreamedSample
from mllm.data.shared_media import parts_that_fit
from mllm.data.skipped import MIN_SEEN, SkippedSample
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.worker_process import max_unloaded
from mllm.utils.files import write_text_whole, writing
from mllm.utils.random_generator import random_generator

NUM_AT_ONCE = 64
"""Samples whose tokens are counted in one call, which is faster than one by one."""
CountTokens = Callable[[Sequence[Sample]], list[int | ValueError]]
"""Counts the tokens of each sample at the largest budgets, or says why it cannot be used."""


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """Holds a good sample, its epoch, and its tokens with every medium at its largest budget."""

    sample: Sample
    epoch: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StreamedBatch:
    """Holds one micro-batch.

    Args:
        skipped: what could not be used on the way to it.
        spares: others of the same pool, for when no row of the batch can be loaded.
    """

    rows: tuple[StreamedRow, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()
    spares: tuple[StreamedRow, ...] = ()


@dataclass(slots=True)
class Pool:
    """Holds samples that are shuffled together, and where the first one stands."""

    start: Position | None = None
    rows: list[StreamedRow] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) + len(self.skipped)


class PoolNotes:
    """Notes in the run folder where each pool of a slot begins, and with the how-manieth batch of the slot.

    Args:
        folder: holds a file per slot, of a line per pool.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, slot: int, num_batches: int) -> tuple[int, Position | None]:
        """Return how many batches come before the pool that so many lead into, and where it begins.

        Later pools are forgotten: they may be others this time, where limits of files have changed.

        Raises:
            ValueError: a note that is none; the file and its line are named.
        """
        file = self._file(slot)
        if not num_batches:
            file.unlink(missing_ok=True)
            return 0, None
        # A line that a kill cut short has no end; it is of a pool that nothing was trained on.
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]
        pools = [pool for number, line in enumerate(whole, 1) if (pool := _noted(file, number, line))[0] <= num_batches]
        if not pools:
            file.unlink(missing_ok=True)
            return 0, None
        write_text_whole(file, "".join(_note(*pool) for pool in pools[:-1]))  # the last one is noted again
        return pools[-1]

    def note(self, slot: int, num_batches: int, start: Position) -> None:
        """Note a pool, before the first of its batches is trained on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = _note(num_batches, start).encode()
        file_name = self._file(slot)
        with writing(file_name, len(content)), open(file_name, "ab", buffering=0) as file:
            file.write(content)

    def _file(self, slot: int) -> Path:
        return self.folder / f"slot-{slot:05d}.jsonl"


def _note(num_batches: int, start: Position) -> str:
    return json.dumps({"batches_before": num_batches, **start._asdict()}) + "\n"


def _noted(file: Path, number: int, line: str) -> tuple[int, Position]:
    """Read what `_note` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        note = json.loads(line)
        return int(note["batches_before"]), Position(int(note["unit"]), int(note["row"]))
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(
            f"{file} is damaged in line {number}; remove it, and the pools before this step are made again"
        ) from error


class StreamBatches(Sampler[StreamedBatch]):
    """Batch sampler of one process. It goes on for ever and has no length: the trainer counts steps.

    Args:
        shards: where samples come from.
        count_tokens: see `CountTokens`.
        config: of which the limits of batches and `stream` count.
        slots: this process among all.
        notes: of the run.
        start_step: whoever resumes passes over the batches of so many steps; these come empty, and are not made.
        num_repeated: the first so many batches of this process come again and again; all of the data when None.
    """

    def __init__(
        self,
        shards: Shards,
        count_tokens: CountTokens,
        *,
        config: DataConfig,
        seed: int,
        slots: RankSlots,
        notes: PoolNotes,
        start_step: int = 0,
        num_repeated: int | None = None,
    ) -> None:
        assert config.stream is not None
        self.shards = shards
        self.count_tokens = count_tokens
        self.limits = {"max_tokens": config.tokens_per_batch, "max_rows": config.max_rows}
        self.pool_size = config.stream.shuffle_samples
        self.num_ahead = config.stream.shards_ahead
        # What comes again and again is never done with.
        self.max_unloaded = max_unloaded(config.num_workers) if num_repeated is None else math.inf
        self.seed = seed
        self.slots = slots
        self.notes = notes
        self.start_step = start_step
        self.num_repeated = num_repeated

    def __iter__(self) -> Iterator[StreamedBatch]:
        if self.num_repeated is None:
            return self._all(self.start_step)
        return cycle(list(islice(self._all(0), self.num_repeated)))

    def num_tokens(self, batch: StreamedBatch) -> int:
        """Count the tokens of a batch at the largest budgets, padding left out."""
        return sum(row.num_tokens for row in batch.rows)

    def _all(self, start_step: int) -> Iterator[StreamedBatch]:
        slots, num_ranks = self.slots, self.slots.num_ranks
        numbers = range(slots.rank, num_ranks * slots.accumulation, num_ranks)
        streams = [self._of_slot(number, start_step) for number in numbers]
        while True:
            for stream in streams:
                yield next(stream)

    def _of_slot(self, slot: int, start_step: int) -> Iterator[StreamedBatch]:
        """Yield the batches of a slot, one per step; the next pool is read little by little meanwhile."""
        num_before, start = self.notes.begin(slot, start_step)
        yield from repeat(StreamedBatch(), num_before)
        num_slots = self.slots.num_ranks * self.slots.accumulation
        samples = self.shards.samples(self.seed, slot=slot, num_slots=num_slots, start=start, num_ahead=self.num_ahead)
        pool = self._read(samples, Pool(), self.pool_size)
        ended: deque[tuple[int, int]] = deque()
        while True:
            assert pool.start is not None
            if not pool.rows and len(pool.skipped) < MIN_SEEN:  # too little to judge by
                pool = self._read(samples, pool, len(pool) + self.pool_size)
                continue
            self.notes.note(slot, num_before, pool.start)
            following = Pool()
            for batch in self._batches(pool):
                while ended and num_before - ended[0][0] >= self.max_unloaded:
                    samples.let_go_before(ended.popleft()[1])
                yield batch
                num_before += 1
                following = self._read(samples, following, min(len(following) + 2 * len(batch.rows), self.pool_size))
            pool = self._read(samples, following, self.pool_size)
            assert pool.start is not None
            ended.append((num_before, pool.start.unit))

    def _read(self, samples: Iterator[StreamedSample], pool: Pool, size: int) -> Pool:
        """Read samples into a pool until there are so many, and count their tokens."""
        while len(pool) < size:
            new = list(islice(samples, min(NUM_AT_ONCE, size - len(pool))))
            if pool.start is None:
                pool.start = new[0].position
            good = [(one.sample, one.epoch) for one in new if isinstance(one.sample, Sample)]
            pool.skipped += [one.sample for one in new if isinstance(one.sample, SkippedSample)]
            counts = self.count_tokens([sample for sample, _ in good])
            for (sample, epoch), count in zip(good, counts, strict=True):
                if isinstance(count, ValueError):
                    pool.skipped.append(SkippedSample.of(sample.id, epoch, count))
                else:
                    pool.rows.append(StreamedRow(sample, epoch, count))
        return pool

    def _batches(self, pool: Pool) -> list[StreamedBatch]:
        """Cut a pool into batches: shuffled, put in order of length, cut, and the batches shuffled again."""
        if not pool.rows:
            return [StreamedBatch(skipped=tuple(pool.skipped))]
        assert pool.start is not None
        rng = random_generator(self.seed, pool.start.unit, str(pool.start.row), "stream")
        shuffled = rng.permutation(len(pool.rows)).tolist()
        lengths = [row.num_tokens for row in pool.rows]
        by_length = sorted(shuffled, key=lambda index: lengths[index])
        parts = _evened(parts_that_fit([by_length], lengths, **self.limits), lengths, self.limits["max_tokens"])
        parts = [parts[number] for number in rng.permutation(len(parts))]
        order = [pool.rows[index] for part in parts for index in part]
        batches, end = [], 0
        for number, part in enumerate(parts):
            start, end = end, end + len(part)
            spares = [*order[end : end + MAX_SUBSTITUTES], *order[: min(start, MAX_SUBSTITUTES)]][:MAX_SUBSTITUTES]
            skipped = () if number else tuple(pool.skipped)
            batches.append(StreamedBatch(tuple(order[start:end]), skipped, tuple(spares)))
        return batches


def _evened(parts: list[list[int]], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Give the last batch, which may have come out small, half of what it and the one before it hold, where it fits."""
    if len(parts) < 2:
        return parts
    both = parts[-2] + parts[-1]
    half = len(both) // 2
    if (len(both) - half) * lengths[both[-1]] > max_tokens:
        return parts
    return [*parts[:-2], both[:half], both[half:]]


class StreamDataset(Dataset[Item | SkippedSample]):
    """Gives the samples of a `StreamedBatch`, loaded as `ManifestDataset` does.

    Args:
        load, seed: see there.
    """

    def __init__(self, load: Load, *, seed: int) -> None:
        self.load = load
        self.seed = seed

    def __getitems__(self, batch: StreamedBatch) -> list[Item | SkippedSample]:
        """Load a batch at once, and pass on what was skipped on the way to it."""
        if not batch.rows:
            return [*batch.skipped]
        # The spares follow the rows, which is where substitutes are looked for.
        samples = [row.sample for row in (*batch.rows, *batch.spares)]
        keys = [SampleKey(row.epoch, number) for number, row in enumerate(batch.rows)]
        return [*ManifestDataset(samples, load=self.load, seed=self.seed).__getitems__(keys), *batch.skipped]
