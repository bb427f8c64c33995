"""Makes the features of a run in one process, or its part of them: estimates how much they take, and encodes them.

Knows a run's config, its store and disks. Does not know shards, encoders, or other processes (`processes.py` does).
"""

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mllm.budget import Extent
from mllm.checkpoints.build import build, build_config, processor_of
from mllm.config.run import RunConfig
from mllm.data.manifest import Sample
from mllm.data.shared_media import with_media
from mllm.model.trainables import set_trainables
from mllm.processing.processor import ElasticProcessor
from mllm.training.feature_cache.features import REMEMBERED_FILES, Form, fill_store, form_of
from mllm.training.feature_cache.store import FeatureStore, claim, refuse_others
from mllm.training.pipeline.loaders import loading, read_samples
from mllm.training.pipeline.token_scan import extents_of

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
VALIDATION = "validation"
"""Folder inside data.features.folder for the samples of data.validation, whose ids may be those of others."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Estimates what is still to be made, at most: items whose encoder input turns out equal are kept once.

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
    """Estimate how much the features take that are not there yet, from the headers of the files.

    Args:
        sizes: D by medium.
    """
    fixed = {medium for medium in sizes if not form.changes(medium)}
    missing = store.missing(samples)
    rows = dict.fromkeys(sizes, 0)
    seen: set[tuple[Any, ...]] = set()
    extents: dict[str, tuple[Extent, ...]] = {}
    for sample, version in missing:
        if sample.id not in extents:
            extents[sample.id] = extents_of(sample, processor)
        for part, extent in zip(sample.media, extents[sample.id], strict=True):
            # Audio beside its video may be cut to its length, and is then another one.
            item = (sample.root, part.path, len(sample.media))
            item = item if part.medium in fixed else (*item, sample.id, version)
            if item not in seen:
                seen.add(item)
                rows[part.medium] += extent.length // form.pooled.get(part.medium, 1)
    num_bytes = sum(rows[medium] * sizes[medium] for medium in sizes) * BYTES_PER_VALUE[form.dtype]
    return Estimate(len(missing), rows, num_bytes, shutil.disk_usage(store.folder).free)


@dataclass(frozen=True)
class Stores:
    """Holds the features of a run: of the samples it trains on, of those it validates on if it does, and their form."""

    train: FeatureStore
    validation: FeatureStore | None
    form: Form

    def read_indices(self) -> None:
        """Take in what all processes have written."""
        for store in (self.train, self.validation):
            if store is not None:
                store.read_index()


@dataclass
class FeatureSamples:
    """Lists the samples whose features a run reads: `train` with captions, augmented, and `validation` as they are."""

    train: list[Sample]
    validation: list[Sample] = field(default_factory=list)

    def only(self, media: Collection[str]) -> "FeatureSamples":
        """Leave out the items of other media, and the samples that show none of these."""
        parts = ([with_media(sample, media) for sample in samples] for samples in (self.train, self.validation))
        return FeatureSamples(*([sample for sample in samples if sample.media] for samples in parts))


def with_captions(samples: list[Sample], captions: Sequence[Sample]) -> list[Sample]:
    """List the samples that a run trains on, and of its captions those that are not among them.

    Raises:
        ValueError: two that show different files have one id, by which features are kept.
    """
    known = {sample.id: sample for sample in samples}
    for caption in captions:
        sample = known.get(caption.id)
        if sample is not None and (sample.root, sample.media) != (caption.root, caption.media):
            raise ValueError(
                f"the id {caption.id!r} is one sample in data.train and another in data.captions, and data.features "
                "keeps features by id"
            )
    return [*samples, *(caption for caption in captions if caption.id not in known)]


def filled_stores(
    config: RunConfig,
    model: Any,
    processor: ElasticProcessor,
    samples: FeatureSamples,
    *,
    rank: int,
    num_ranks: int,
    progress: Callable[[int, int], None] | None = None,
) -> Stores:
    """Fill the stores of a run with this process's part.

    Args:
        progress: is called with how many of how many samples and versions of this part are done, in both stores.

    Raises:
        ValueError: a folder holds features of something else, or the disk is too small for what is missing.
    """
    before, samples = 0, samples.only(config.kept_media)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(before + done, before + total)

    fill = partial(_filled, config, model, processor, rank=rank, num_ranks=num_ranks, progress=report)
    train, form, before = fill(samples.train, augmented=True)
    if not samples.validation:
        return Stores(train, None, form)
    validation, _, _ = fill(samples.validation, augmented=False)
    return Stores(train, validation, form)


def _filled(
    config: RunConfig,
    model: Any,
    processor: ElasticProcessor,
    samples: list[Sample],
    *,
    augmented: bool,
    rank: int,
    num_ranks: int,
    progress: Callable[[int, int], None],
) -> tuple[FeatureStore, Form, int]:
    """Fill one store; also return its form, and how many samples and versions this process has encoded."""
    store = _store_of(config, augmented=augmented)
    form = form_of(model.config, processor, config, augmented=augmented)
    if rank == 0:
        claim(store.folder, form.fingerprint)
        store.read_index()
        estimated = estimate(store, samples, processor, form, sizes_of(model, config.kept_media))
        if estimated.num_samples:
            logger.info("%s", estimated)
            estimated.check(store.folder)
    load = loading(config.data, processor, augmented=augmented, remembered_files=REMEMBERED_FILES)
    encoded = fill_store(store, model, samples, load, form=form, rank=rank, num_ranks=num_ranks, progress=progress)
    return store, form, encoded


def _store_of(config: RunConfig, *, augmented: bool) -> FeatureStore:
    features = config.data.features
    assert features is not None
    folder = Path(features.folder)
    if not augmented:
        return FeatureStore(folder / VALIDATION, 1, None)
    return FeatureStore(folder, features.versions, features.seed)


def sizes_of(model: Any, media: Iterable[str]) -> dict[str, int]:
    """List D by medium."""
    return {medium: model.model.encoder(medium).hidden_size for medium in media}


def check_folder(config: RunConfig) -> None:
    """Refuse the folder of a run's features where it holds others, before anything is read, loaded or encoded.

    Raises:
        ValueError: what differs is named, or a medium whose features cannot be kept as the config says.
    """
    tokenizer, elastic = build_config(config.model)
    processor = processor_of(config.model, tokenizer, elastic, limits=config.data.limits)
    for augmented in (True, False) if config.data.validation else (True,):
        form = form_of(elastic, processor, config, augmented=augmented)
        refuse_others(_store_of(config, augmented=augmented).folder, form.fingerprint)


def make_features(
    config: RunConfig,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Make a part of the features a run reads, without training; any number of processes may each make theirs.

    Returns:
        The store of the samples that are trained on.

    Raises:
        ValueError: see `filled_stores`.
    """
    import torch

    check_folder(config)
    data = config.data  # read before the model is built: a mistake shows at once
    train, captions, validation = (read_samples(files, data) for files in (data.train, data.captions, data.validation))
    samples = FeatureSamples(with_captions(train, captions), validation)
    model, processor = build(config.model, limits=data.limits)
    set_trainables(model, config.parts)  # what is frozen stands in eval mode
    if torch.cuda.is_available() and not config.train.use_cpu:
        model.to(f"cuda:{rank % torch.cuda.device_count()}")  # pyright: ignore[reportArgumentType]
    return filled_stores(config, model, processor, samples, rank=rank, num_ranks=num_ranks, progress=progress).train
