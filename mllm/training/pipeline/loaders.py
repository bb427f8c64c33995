"""From manifests to the micro-batches of a process: files to samples to `{"batch": Batch}`.

Knows the `data` block of a run. Does not know the model's weights, draws or the optimizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from mllm.budget import Budget
from mllm.config.run import DataConfig
from mllm.data.batching import Lengths, TokenBucketBatchSampler
from mllm.data.dataset import Collator, ManifestDataset
from mllm.data.manifest import Sample
from mllm.data.readers import read_data
from mllm.data.shared_media import parts_that_fit, samples_that_share
from mllm.data.skipped import SkipLog
from mllm.media import MediaError, MediaLoader, RememberingLoader, load_audio
from mllm.processing.batch import check_length
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.training.interruption import ignore_interrupts
from mllm.training.pipeline.batches import RoundBatches
from mllm.training.pipeline.token_scan import Survey
from mllm.training.throughput import Stopwatch, TimedLoad
from mllm.transforms.augmentation import Augmentation, TimeMask
from mllm.transforms.noise import MixNoise

SKIPPED_FILE = "skipped-{rank}.jsonl"


def read_samples(manifests: Sequence[str], settings: DataConfig) -> list[Sample]:
    """The samples of all manifests.

    Raises:
        ValueError: a bad row, an id that two manifests use, or a question that is there without an answer.
        OSError: a manifest cannot be read.
    """
    samples = [sample for path in manifests for sample in read_data(path, settings.root, settings.reader)]
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"the id {sample.id!r} is used by two of the manifests {', '.join(manifests)}")
        seen.add(sample.id)
        if sample.messages[-1].role != "assistant":
            raise ValueError(f"sample {sample.id!r} has no answer to learn from: its last message is the user's")
    return samples


def train_loader(
    data: ManifestDataset,
    surveyed: Survey,
    *,
    settings: DataConfig,
    encode: Callable[..., dict[str, Any]],
    run: Path,
    seed: int,
    lanes: dict[str, int],
) -> DataLoader[Any]:
    """Micro-batches of this process, for ever.

    Args:
        data: the samples and how their media are loaded.
        encode: samples and their media to a batch, see `encode`; a sample that it refuses is left out.
        run: the run folder; what is left out is listed there.
        lanes: `process_index`, `num_processes` and `accumulation`.
    """
    batches = round_batches(data.samples, surveyed, settings=settings, seed=seed, lanes=lanes)
    skip_log = SkipLog(
        run / SKIPPED_FILE.format(rank=lanes["process_index"]), max_bad_fraction=settings.max_bad_fraction
    )
    collator = Collator(encode, skip_log=skip_log)
    return DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=settings.num_workers,
        worker_init_fn=ignore_interrupts,
    )


def round_batches(
    samples: Sequence[Sample], surveyed: Survey, *, settings: DataConfig, seed: int, lanes: dict[str, int]
) -> RoundBatches:
    """Which samples are in which micro-batch of this process; see `train_loader`."""
    kinds = media_groups(samples) if settings.group_by_media else None
    limits = {"max_tokens": settings.tokens_per_batch, "max_rows": settings.max_rows}
    groups = parts_that_fit(samples_that_share(samples), surveyed.tokens, **limits) if settings.share_media else ()
    return RoundBatches(Lengths(surveyed.tokens, surveyed.smallest, kinds, groups), seed=seed, **limits, **lanes)


def validation_loader(
    data: ManifestDataset,
    surveyed: Survey,
    *,
    settings: DataConfig,
    processor: ElasticProcessor,
    budgets: Sequence[Budget],
    process_index: int,
    num_processes: int,
) -> tuple[DataLoader[Any], int]:
    """Validation batches of this process, clean and in order, and how many of them count; a bad sample is an error.

    Args:
        data: the samples and how their media are loaded, without augmentation.
    """
    batches = TokenBucketBatchSampler(
        surveyed.tokens,
        max_tokens=settings.tokens_per_batch,
        max_rows=settings.max_rows,
        process_index=process_index,
        num_processes=num_processes,
        shuffle=False,
    )
    own = partial(encode, processor=processor, budgets=budgets, max_sample_tokens=settings.max_sample_tokens)
    collator = Collator(own)
    loader = DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=settings.num_workers,
        worker_init_fn=ignore_interrupts,
    )
    return loader, len(batches) - batches.num_repeated


def loading(
    settings: DataConfig,
    processor: ElasticProcessor,
    *,
    augmented: bool,
    budgets: Sequence[Budget] = (),
    remembered_files: int = 0,
    watch: Stopwatch | None = None,
) -> Callable[..., list[LoadedMedia]]:
    """What loads the media of a sample; changed by chance where the settings say so.

    Args:
        budgets: what samples will be asked at; images that are cut into tiles are cut as these ask.
        remembered_files: how many decoded files are kept for samples that follow each other and share them.
        watch: takes the time.

    Raises:
        ValueError: noise that is silent.
    """
    reader = MediaLoader(
        gray=True,
        backend=settings.video_backend,
        max_mismatch_seconds=settings.max_mismatch_seconds,
        limits=settings.limits,
    )
    reader = RememberingLoader(reader, remembered_files) if remembered_files else reader
    augmentation = build_augmentation(settings) if augmented else None
    return TimedLoad(processor, reader, watch or Stopwatch(), augmentation=augmentation, budgets=tuple(budgets))


def build_augmentation(settings: DataConfig) -> Augmentation:
    """What the `data` block asks for.

    Raises:
        ValueError: noise that is silent; the file is named.
        MediaError: noise that cannot be read.
    """
    try:
        mix = (
            None
            if settings.noise is None
            else MixNoise(load_audio(settings.noise, limits=settings.limits), settings.snr_db)
        )
    except MediaError:
        raise
    except ValueError as error:
        raise ValueError(f"data.noise {settings.noise}: {error}") from error
    masks = [TimeMask(*mask) if mask else None for mask in (settings.audio_mask_samples, settings.video_mask_frames)]
    return Augmentation(mix, *masks, flip_probability=settings.flip_probability)


def media_groups(samples: Sequence[Sample]) -> list[int]:
    """Of each sample a number that it shares with those that have the same media: as many images, and sound or video
    or neither."""
    numbers: dict[tuple[int, ...], int] = {}
    kinds = [[part.medium for part in sample.media] for sample in samples]
    keys = [(own.count("image"), "audio" in own, "video" in own) for own in kinds]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def encode(
    samples: Sequence[Sample],
    media: Sequence[Sequence[LoadedMedia]],
    *,
    processor: ElasticProcessor,
    budgets: Sequence[Budget],
    max_sample_tokens: int | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """A micro-batch, once it is sure that every row can meet the budgets, and the seconds it took by `watch`.

    Args:
        budgets: the extremes of what is drawn.
        max_sample_tokens: where longer rows are cut, every medium at its largest budget; see `Row.cut`.
        watch: has the time of loading.

    Raises:
        ValueError: a row that cannot, such as a clip too short for a rate, that the LLM cannot read whole, or whose cut
            would lose a medium; the sample is named.
    """
    with (watch or Stopwatch()).measure("collate"):
        batch = processor.batch(samples, media, for_training=True)
        if max_sample_tokens is not None:
            placeholders = frozenset(processor.placeholder_ids.values())
            rows = [row.cut(max_sample_tokens, processor.space, placeholders) for row in batch.rows]
            batch = replace(batch, rows=rows)
        for row in batch.rows:
            for budget in budgets:
                check_length(row, row.token_counts(budget, processor.space), processor.context_tokens)
    return {"batch": batch} if watch is None else {"batch": batch, "seconds": watch.take()}
