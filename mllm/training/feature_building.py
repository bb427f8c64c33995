"""Features of a run made and looked over: how much they will take, by how many processes, and whether they are whole.

Knows a run's settings, its store, disks and processes. Does not know shards or encoders.
"""

import logging
import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from mllm.budget import Extent
from mllm.building import build
from mllm.data.manifest import Sample
from mllm.processing import ElasticProcessor
from mllm.progress import Progress
from mllm.trainables import set_trainables
from mllm.training.feature_store import (
    FeatureStore,
    claim,
    digest_of_file,
    fingerprint_differences,
    missing_keys,
    read_fingerprint,
)
from mllm.training.features import REMEMBERED_FILES, Form, fill_store, form_of
from mllm.training.loaders import loading, read_samples
from mllm.training.settings import RunSettings
from mllm.training.survey import extents_of

SECONDS_TO_END = 10.0
"""That a process is given to end by itself."""
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """What is still to be made, at most: items whose encoder input turns out equal are kept once.

    `num_samples` counts versions, `rows` are features by medium, `free_bytes` are those of the disk.
    """

    num_samples: int
    rows: dict[str, int]
    num_bytes: int
    free_bytes: int

    def check(self, folder: Path) -> None:
        """Raises: ValueError when the disk has less room than may be needed."""
        if self.num_bytes > self.free_bytes:
            raise ValueError(
                f"data.features.folder {folder}: features may take {self.num_bytes:,} bytes and {self.free_bytes:,} "
                "are free there; features.dtype bfloat16, features.pooled or fewer features.versions take less"
            )

    def __str__(self) -> str:
        rows = ", ".join(f"{medium} {count:,}" for medium, count in self.rows.items()) or "none"
        return (
            f"{self.num_samples:,} samples and versions to encode; features at most: {rows}; "
            f"{self.num_bytes / 1e9:.3f} GB, {self.free_bytes / 1e9:.0f} GB are free"
        )


def estimate(
    store: FeatureStore, samples: Sequence[Sample], processor: ElasticProcessor, form: Form, sizes: dict[str, int]
) -> Estimate:
    """How much the features take that are not there yet, from the headers of the files.

    Args:
        sizes: D by medium.
    """
    fixed = {medium for medium in sizes if not form.changes(medium)}
    missing = store.missing(samples)
    rows = dict.fromkeys(sizes, 0)
    seen: set[tuple[Any, ...]] = set()
    looked: dict[str, tuple[Extent, ...]] = {}
    for sample, version in missing:
        if sample.id not in looked:
            looked[sample.id] = extents_of(sample, processor)
        for part, extent in zip(sample.media, looked[sample.id], strict=True):
            # A sound beside its video may be cut to its length, and is then another one.
            item = (sample.root, part.path, len(sample.media))
            item = item if part.medium in fixed else (*item, sample.id, version)
            if item not in seen:
                seen.add(item)
                rows[part.medium] += extent.length // form.pooled.get(part.medium, 1)
    num_bytes = sum(rows[medium] * sizes[medium] for medium in sizes) * BYTES_PER_VALUE[form.dtype]
    return Estimate(len(missing), rows, num_bytes, shutil.disk_usage(store.folder).free)


def filled_store(
    settings: RunSettings,
    model: Any,
    processor: ElasticProcessor,
    samples: list[Sample],
    *,
    rank: int,
    num_ranks: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[FeatureStore, Form]:
    """The store of a run with this process's share in it.

    Raises:
        ValueError: the folder holds features of something else, or the disk is too small for what is missing.
    """
    own = settings.data.features
    assert own is not None
    store = FeatureStore(Path(own.folder), own.versions, own.seed)
    form = form_of(model.config, processor, settings)
    if rank == 0:
        claim(store.folder, form.fingerprint)
        store.read_index()
        found = estimate(store, samples, processor, form, sizes_of(model))
        if found.num_samples:
            logger.info("%s", found)
            found.check(store.folder)
    load = loading(settings.data, processor, augmented=True, remembered_files=REMEMBERED_FILES)
    fill_store(store, model, samples, load, form=form, rank=rank, num_ranks=num_ranks, progress=progress)
    return store, form


def sizes_of(model: Any) -> dict[str, int]:
    """D by medium."""
    return {medium: model.model.tower(medium).hidden_size for medium in model.model.compressors}


def make_features(
    settings: RunSettings,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Make a share of the features a run reads, without training; any number of processes may each make theirs.

    Raises:
        ValueError: see `filled_store`.
    """
    import torch

    samples = read_samples(settings.data.train, settings.data)  # before the model: a mistake shows at once
    model, processor = build(settings.model)
    set_trainables(model, settings.parts)  # what is frozen stands in eval mode
    if torch.cuda.is_available() and not settings.train.use_cpu:
        model.to(f"cuda:{rank % torch.cuda.device_count()}")  # pyright: ignore[reportArgumentType]
    ranks = {"rank": rank, "num_ranks": num_ranks}
    return filled_store(settings, model, processor, samples, **ranks, progress=progress)[0]


@dataclass(frozen=True)
class Made:
    """What a build did: samples and versions it encoded, and the seconds that took."""

    num_samples: int
    seconds: float


def build_features(settings: RunSettings, *, processes: int, show: Progress) -> Made:
    """Make all features of a run, by several processes on this machine.

    Raises:
        ValueError: see `filled_store`; or a process failed.
    """
    assert settings.data.features is not None
    started = time.monotonic()
    if processes == 1:
        counts = [0]

        def note(done: int, total: int) -> None:
            counts[0] = done
            show("encoding", done, total)

        make_features(settings, progress=note)
        return Made(counts[0], time.monotonic() - started)
    context = multiprocessing.get_context("spawn")  # forked processes cannot use a GPU
    shared = [(context.Value("q", 0), context.Value("q", 0)) for _ in range(processes)]
    running = [
        context.Process(target=_share, args=(settings, rank, processes, *shared[rank])) for rank in range(processes)
    ]
    with _ended_together(running):
        running[0].start()
        _wait_for_claim(running[0], shared[0][1])
        for process in running[1:]:
            process.start()
        while any(process.is_alive() for process in running):
            show("encoding", sum(done.value for done, _ in shared), sum(max(total.value, 0) for _, total in shared))
            time.sleep(0.2)
    if failed := [rank for rank, process in enumerate(running) if process.exitcode]:
        raise ValueError(f"process {failed[0]} of {processes} that made features failed; its message stands above")
    return Made(sum(done.value for done, _ in shared), time.monotonic() - started)


@contextmanager
def _ended_together(running: Sequence[BaseProcess]) -> Iterator[None]:
    """End what still runs when the block is left, however that comes.

    A scheduler's SIGTERM would end this process alone, and leave its workers behind to encode for nobody.
    """

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()  # only there may a signal be handled
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        yield
    finally:
        started = [process for process in running if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _wait_for_claim(first: Any, total: Any) -> None:
    """Until the first process has found that folder and disk will do, or has failed."""
    while first.is_alive() and total.value == 0:
        time.sleep(0.05)


def _share(
    settings: RunSettings, rank: int, num_ranks: int, done: "Synchronized[int]", total: "Synchronized[int]"
) -> None:
    """What one process does; says how far it is."""
    import sys

    import torch

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mllm.training").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))

    def note(now: int, there: int) -> None:
        done.value, total.value = now, there

    try:
        make_features(settings, rank=rank, num_ranks=num_ranks, progress=note)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"process {rank}: {error}\n")
        sys.exit(1)


@dataclass
class Checked:
    """What was found in a folder of features: lines about it, and lines about what is wrong."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_features(folder: Path, settings: RunSettings | None = None) -> Checked:
    """Look over a folder: what it holds, every byte of it, and, with settings, what a run would miss.

    Raises:
        ValueError: it holds no features.
    """
    fingerprint = read_fingerprint(folder)
    if not fingerprint:
        raise ValueError(f"{folder} holds no features (there is no fingerprint.json)")
    store = FeatureStore(folder)
    store.read_index()
    found = Checked()
    items = {own.key: own for kept in store.entries.values() if not isinstance(kept, str) for own in kept}
    for medium, own in fingerprint.items():
        mine = [item for item in items.values() if item.medium == medium]
        shards = [shard for shard in store.shards.values() if shard.name.startswith(f"{medium}-")]
        rate = own.get("pooled_frames", 1)
        found.facts.append(
            f"{medium}: {len(mine):,} items, {sum(item.num_rows for item in mine):,} rows "
            f"({'every frame' if rate == 1 else f'means of {rate} frames'}, {own.get('dtype')}), {len(shards)} shards, "
            f"{sum(shard.num_bytes for shard in shards):,} bytes; encoder {str(own.get('encoder'))[:12]}"
        )
    found.facts.append(f"{len({place[0] for place in store.entries}):,} samples, {len(store.entries):,} with versions")
    for shard in store.shards.values():
        file = folder / shard.name
        if not file.exists():
            found.problems.append(f"{shard.name} is gone")
        elif file.stat().st_size != shard.num_bytes or digest_of_file(file) != shard.digest:
            found.problems.append(f"{shard.name} is not what was written (its digest differs)")
    found.problems += [f"{place[0]} version {place[1]}: {why}" for place, _, why in missing_keys(store)]
    if settings is not None:
        _check_for_run(found, store, fingerprint, settings)
    return found


def _check_for_run(found: Checked, store: FeatureStore, fingerprint: dict[str, Any], settings: RunSettings) -> None:
    """Whether a run could read what is there, and what it would have to make."""
    from mllm.building import build_processor, elastic_config

    processor = build_processor(settings.model)
    form = form_of(elastic_config(settings.model, processor), processor, settings)
    differences = fingerprint_differences(fingerprint, form.fingerprint)
    found.problems += [f"not of this config: {words}" for words in differences]
    found.problems += [f"not of this config: no {medium}" for medium in form.fingerprint if medium not in fingerprint]
    samples = read_samples(settings.data.train, settings.data)
    assert settings.data.features is not None
    store.versions = settings.data.features.versions
    for sample, version in store.missing(samples):
        entry = store.entries.get((sample.id, version))
        why = "missing" if entry is None else entry if isinstance(entry, str) else "its files have changed"
        found.problems.append(f"{sample.id} version {version}: {why}")
    wanted = len(samples) * store.versions
    found.facts.append(f"{wanted:,} samples and versions in the manifests")
