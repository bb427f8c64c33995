"""Batches of a stream: every sample once, whoever reads it, within the limits, from any step on, in bounded memory."""

import gc
import itertools
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_hub
from torch.utils.data import DataLoader
from webdataset_shards import write_shard, write_texts

from mllm.config.data import ReaderConfig, StreamConfig
from mllm.config.run import DataConfig
from mllm.data.dataset import Item
from mllm.data.hub import list_shards
from mllm.data.hub_cache import HubCache
from mllm.data.manifest import Sample
from mllm.data.shard_stream import Shards
from mllm.data.skipped import SkippedSample
from mllm.media import resolve_media
from mllm.media.limits import open_media
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.stream_batches import PoolNotes, StreamBatches, StreamDataset
from mllm.training.pipeline.worker_process import worker_options


def tokens_of(sample: Sample) -> int:
    return len(sample.messages[0].text)


def count_tokens(samples: Sequence[Sample]) -> list[int | ValueError]:
    return [tokens_of(sample) if tokens_of(sample) <= 30 else ValueError("too long") for sample in samples]


def load(sample: Sample, *, generator: np.random.Generator | None) -> Any:
    if "bad" in sample.messages[0].text:
        raise ValueError("it cannot be loaded")
    return generator.random() if generator else None


def batches_of(
    folder: Path, run: Path, *, slots: RankSlots | None = None, shuffle_samples: int = 8, **options: Any
) -> StreamBatches:
    config = DataConfig(
        train=["unused"],
        reader=ReaderConfig(format="webdataset"),
        stream=StreamConfig(shuffle_samples=shuffle_samples),
        tokens_per_batch=64,
        max_rows=4,
    )
    shards = Shards.of([str(folder)], None, config.reader)
    notes = PoolNotes(run / "stream")
    slots = slots or RankSlots()
    return StreamBatches(shards, count_tokens, config=config, seed=5, slots=slots, notes=notes, **options)


def loaded(batches: StreamBatches, num_workers: int, count: int) -> list[list[Item | SkippedSample]]:
    loader: Any = DataLoader(
        StreamDataset(load, seed=5),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=list,
        num_workers=num_workers,
    )
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_epoch_is_every_sample_once_whoever_reads_it(tmp_path: Path, num_ranks: int, num_workers: int) -> None:
    ids = write_texts(tmp_path / "shards", [9, 3, 12, 0, 7, 1])
    read = []
    for rank in range(num_ranks):
        slots = RankSlots(rank, num_ranks, accumulation=2 // num_ranks)
        batches = batches_of(tmp_path / "shards", tmp_path / "run", slots=slots)
        read.append(loaded(batches, num_workers, 2 * 20 // num_ranks))
    items = [item for of_rank in read for batch in of_rank for item in batch]
    assert all(isinstance(item, Item) for item in items)
    for epoch in range(2):
        assert sorted(item.sample.id for item in items if item.epoch == epoch) == ids  # type: ignore[union-attr]
    # Processes and workers change nothing: batch k of a step is that of one process with nobody beside it.
    alone = loaded(batches_of(tmp_path / "shards", tmp_path / "one", slots=RankSlots(accumulation=2)), 0, 40)
    assert [batch for step in zip(*read, strict=True) for batch in step] == alone


def test_batches_are_shuffled_alike_in_length_and_within_the_limits(tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [40, 40])
    batches = list(itertools.islice(batches_of(tmp_path / "shards", tmp_path, shuffle_samples=40), 60))
    lengths = [[row.num_tokens for row in batch.rows] for batch in batches]
    assert all(len(rows) <= 4 and len(rows) * max(rows) <= 64 for rows in lengths)
    assert sum(map(sum, lengths)) > 0.85 * sum(len(rows) * max(rows) for rows in lengths)
    orders = [[row.sample.id for batch in batches for row in batch.rows if row.epoch == epoch] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("start_step", "has_notes"), [(1, True), (7, True), (12, False)])
def test_a_stream_goes_on_at_any_step(tmp_path: Path, start_step: int, has_notes: bool) -> None:
    write_texts(tmp_path / "shards", [9, 3, 12, 0, 7, 1])
    whole = list(itertools.islice(batches_of(tmp_path / "shards", tmp_path, slots=RankSlots(accumulation=2)), 40))
    if not has_notes:
        shutil.rmtree(tmp_path / "stream")
    # What was two micro-batches of one process may be one of two, and the other way round.
    for rank in range(2):
        batches = batches_of(tmp_path / "shards", tmp_path, slots=RankSlots(rank, 2), start_step=start_step)
        assert list(itertools.islice(batches, start_step, 20)) == whole[rank::2][start_step:]


def test_only_the_pool_that_a_step_lies_in_is_made_again(tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [50] * 8)
    list(itertools.islice(batches_of(tmp_path / "shards", tmp_path), 200))
    counted = Counter()

    def counting(samples: Sequence[Sample]) -> list[int | ValueError]:
        counted.update(sample.id for sample in samples)
        return count_tokens(samples)

    batches = batches_of(tmp_path / "shards", tmp_path, start_step=150)
    batches.count_tokens = counting
    next(itertools.islice(batches, 150, None))
    assert sum(counted.values()) <= 3 * 8
    with open(tmp_path / "stream" / "slot-00000.jsonl", "a") as file:
        file.write('{"batches_before": 15')  # a kill in the midst of a line
    expected = list(itertools.islice(batches_of(tmp_path / "shards", tmp_path / "new"), 200))
    assert list(itertools.islice(batches, 150, 200)) == expected[150:]
    # What was noted behind that is of pools that are made anew, and may begin elsewhere by then.
    assert list(itertools.islice(batches, 150, 160)) == expected[150:160]
    files = [run / "stream" / "slot-00000.jsonl" for run in (tmp_path, tmp_path / "new")]
    assert files[1].read_text().startswith(files[0].read_text())


@pytest.mark.parametrize("line", ["{}", '{"batches_before": 1, "unit": "x", "row": 0}', "[1}", "\xff}"])
def test_notes_that_are_damaged_are_named(tmp_path: Path, line: str) -> None:
    write_texts(tmp_path / "shards", [50] * 8)
    list(itertools.islice(batches_of(tmp_path / "shards", tmp_path), 200))
    notes = tmp_path / "stream" / "slot-00000.jsonl"
    first, _, *rest = notes.read_text().splitlines()
    notes.write_text("\n".join([first, line, *rest]) + "\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"slot-00000.jsonl is damaged in line 2; remove it"):
        next(iter(batches_of(tmp_path / "shards", tmp_path, start_step=150)))
    next(iter(batches_of(tmp_path / "shards", tmp_path)))  # a run from its start needs none of them


def test_bad_samples_travel_with_a_batch_and_a_batch_of_bad_ones_gets_another(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    texts = ["fine"] * 6 + ["bad"] * 6 + ["x" * 31]
    rows = {f"{number}": {"json": {"question": text, "answer": "b"}} for number, text in enumerate(texts)}
    write_shard(folder / "0.tar", {**rows, "13": {"json": b"{"}})
    read = loaded(batches_of(folder, tmp_path, shuffle_samples=14), 0, 4)
    reasons = {one.sample_id: one.reason for batch in read for one in batch if isinstance(one, SkippedSample)}
    assert reasons.keys() == {"6", "7", "8", "9", "10", "11", "12", "13"}
    assert reasons["12"] == "too long"
    assert reasons["13"].startswith(f"{folder / '0.tar'}: 13: ")
    assert all(any(isinstance(item, Item) for item in batch) for batch in read)


def test_where_nothing_is_good_the_bad_ones_come_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards" / "0.tar", {str(number): {"json": b"{"} for number in range(40)})
    batch = next(iter(batches_of(tmp_path / "shards", tmp_path)))
    assert not batch.rows
    assert len(batch.skipped) >= 500


def test_the_first_batches_come_again_and_again(tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [20])
    read = list(itertools.islice(batches_of(tmp_path / "shards", tmp_path, num_repeated=2, start_step=3), 6))
    assert read[:2] == read[2:4] == read[4:]
    assert read[0] != read[1]


@pytest.mark.slow
def test_memory_is_that_of_two_pools(tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [50, 50])
    kept = []
    for count in (20, 120):
        batches = iter(batches_of(tmp_path / "shards", tmp_path, shuffle_samples=50))
        next(batches)
        tracemalloc.start()
        num_rows = sum(len(batch.rows) for batch in itertools.islice(batches, count))
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert num_rows > 2 * count
    assert kept[1] < kept[0] + 50_000


def test_what_needs_to_know_all_samples_is_refused() -> None:
    good: dict[str, Any] = {"train": ["a"], "reader": ReaderConfig(format="webdataset"), "stream": StreamConfig()}
    DataConfig(**good)
    with pytest.raises(
        ValueError, match=r"data.stream goes with data.reader.format webdataset, parquet, datasets, not manifest"
    ):
        DataConfig(**{**good, "reader": ReaderConfig()})
    for key in ("group_by_media", "share_media"):
        with pytest.raises(ValueError, match=rf"data.{key} needs to know all samples; leave it out with data.stream"):
            replace(DataConfig(**good), **{key: True})
    with pytest.raises(ValueError, match=r"shuffle_samples is 0; it must be at least 1"):
        StreamConfig(shuffle_samples=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_of_a_hub_are_kept_until_their_batches_are_loaded_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """Disk for six of twelve shards, and every medium is there when a worker reads it, one step late as it may be."""
    for shard in range(12):
        rows = {f"{shard}-{row}": {"png": b"image %d %d" % (shard, row), "txt": b"red"} for row in range(4)}
        write_shard(tmp_path / "shards" / f"{shard:06d}.tar", rows)
    size = (tmp_path / "shards" / "000000.tar").stat().st_size
    with toy_hub.serving() as hub:
        toy_hub.use(hub, tmp_path / "cache", monkeypatch)
        hub.push("owner/set", tmp_path / "shards")
        reader = ReaderConfig(format="webdataset")
        listings = {"owner/set": list_shards("owner/set", reader)}
        runs = []
        for cache in (HubCache(tmp_path / "own", (6 if num_workers else 3) * size), None):
            config = DataConfig(
                train=["owner/set"],
                reader=reader,
                stream=StreamConfig(shuffle_samples=4),
                max_rows=2,
                num_workers=num_workers,
            )
            shards = Shards.of(["owner/set"], None, reader, listings=listings, hub_cache=cache)
            notes = PoolNotes(tmp_path / ("kept" if cache is None else "bounded"))
            batches = StreamBatches(shards, count_tokens, config=config, seed=5, slots=RankSlots(), notes=notes)
            loader: Any = DataLoader(
                StreamDataset(read_medium, seed=5),
                batch_sampler=batches,  # type: ignore[arg-type]
                collate_fn=list,
                **worker_options(num_workers),
            )
            runs.append([[item.media for item in batch] for batch in itertools.islice(loader, 60)])
        assert runs[0] == runs[1]
        assert len({media for batch in runs[0] for media in batch}) == 48
        assert sum(hub.fetched.values()) >= 12 + 24  # every epoch of the bounded run, one of the other


def read_medium(sample: Sample, *, generator: np.random.Generator | None) -> bytes:
    with open_media(resolve_media(sample.root, sample.media[0].path), 1000) as file:
        return file.read()
