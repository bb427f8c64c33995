"""Makes the micro-batches of a process from manifests: files to samples to `{"batch": Batch}`.

Knows the `data` block of a run config. Does not know the model's weights, sampled budgets or the optimizer.
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
from mllm.training.pipeline.batches import RankBatches, RankSlots
from mllm.training.pipeline.token_scan import TokenScan
from mllm.training.pipeline.worker_process import worker_options
from mllm.training.throughput import Stopwatch, TimedLoad
from mllm.transforms.augmentation import Augmentation, TimeMask
from mllm.transforms.noise import MixNoise

SKIPPED_FILE = "skipped-{rank}.jsonl"


def read_samples(manifests: Sequence[str], config: DataConfig) -> list[Sample]:
    """Read the samples of all manifests.

    Raises:
        ValueError: a bad row, an id that two manifests use, or a question that is there without an answer.
        OSError: a manifest cannot be read.
    """
    samples = [sample for path in manifests for sample in read_data(path, config.root, config.reader)]
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"the id {sample.id!r} is used by two of the manifests {', '.join(manifests)}")
        seen.add(sample.id)
        if sample.messages[-1].role != "assistant" and config.host_answer_tokens is None:
            raise ValueError(f"sample {sample.id!r} has no answer to learn from: its last message is the user's")
    return samples


def train_loader(
    dataset: ManifestDataset,
    scan: TokenScan,
    *,
    config: DataConfig,
    encode: Callable[..., dict[str, Any]],
    run: Path,
    seed: int,
    slots: RankSlots,
    num_repeated: int | None = None,
) -> DataLoader[Any]:
    """Make the loader of this process's micro-batches, which goes on for ever.

    Args:
        dataset: the samples and how their media are loaded.
        encode: samples and their media to a batch, see `encode`; a sample that it refuses is left out.
        run: the run folder; what is left out is listed there.
        slots: this process among all.
        num_repeated: the first so many micro-batches come again and again; all samples when None.
    """
    batches = rank_batches(dataset.samples, scan, config=config, seed=seed, slots=slots, num_repeated=num_repeated)
    skip_log = SkipLog(run / SKIPPED_FILE.format(rank=slots.rank), max_bad_fraction=config.max_bad_fraction)
    collator = Collator(encode, skip_log=skip_log)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        **worker_options(config.num_workers),
    )


def rank_batches(
    samples: Sequence[Sample],
    scan: TokenScan,
    *,
    config: DataConfig,
    seed: int,
    slots: RankSlots,
    num_repeated: int | None = None,
) -> RankBatches:
    """Choose which samples are in which micro-batch of this process; see `train_loader`."""
    kinds = media_groups(samples) if config.group_by_media else None
    limits = {"max_tokens": config.tokens_per_batch, "max_rows": config.max_rows}
    groups = parts_that_fit(samples_that_share(samples), scan.max_tokens, **limits) if config.share_media else ()
    lengths = Lengths(scan.max_tokens, scan.min_tokens, kinds, groups)
    return RankBatches(lengths, seed=seed, slots=slots, num_repeated=num_repeated, **limits)


def validation_loader(
    dataset: ManifestDataset,
    scan: TokenScan,
    *,
    config: DataConfig,
    processor: ElasticProcessor,
    budgets: Sequence[Budget],
    slots: RankSlots,
) -> tuple[DataLoader[Any], int]:
    """Make the loader of this process's validation batches, clean and in order, and say how many of them count.

    A bad sample is an error here.

    Args:
        dataset: the samples and how their media are loaded, without augmentation.
    """
    batches = TokenBucketBatchSampler(
        scan.max_tokens,
        max_tokens=config.tokens_per_batch,
        max_rows=config.max_rows,
        process_index=slots.rank,
        num_processes=slots.num_ranks,
        shuffle=False,
    )
    collator = Collator(
        partial(encode, processor=processor, budgets=budgets, max_sample_tokens=config.max_sample_tokens)
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        **worker_options(config.num_workers),
    )
    return loader, len(batches) - batches.num_repeated


def loading(
    config: DataConfig,
    processor: ElasticProcessor,
    *,
    augmented: bool,
    budgets: Sequence[Budget] = (),
    remembered_files: int = 0,
    watch: Stopwatch | None = None,
) -> Callable[..., list[LoadedMedia]]:
    """Make what loads the media of a sample, augmented as the config says.

    Args:
        budgets: those that samples will be run at; images that are cut into tiles are cut as these ask for.
        remembered_files: how many decoded files are kept for samples that follow each other and share them.
        watch: takes the time.

    Raises:
        ValueError: noise that is silent.
    """
    reader = MediaLoader(
        gray=True,
        backend=config.video_backend,
        max_mismatch_seconds=config.max_mismatch_seconds,
        limits=config.limits,
    )
    reader = RememberingLoader(reader, remembered_files) if remembered_files else reader
    augmentation = build_augmentation(config) if augmented else None
    return TimedLoad(processor, reader, watch or Stopwatch(), augmentation=augmentation, budgets=tuple(budgets))


def build_augmentation(config: DataConfig) -> Augmentation:
    """Build the augmentation that the `data` block asks for.

    Raises:
        ValueError: noise that is silent; the file is named.
        MediaError: noise that cannot be read.
    """
    try:
        mix = None if config.noise is None else MixNoise(load_audio(config.noise, limits=config.limits), config.snr_db)
    except MediaError:
        raise
    except ValueError as error:
        raise ValueError(f"data.noise {config.noise}: {error}") from error
    masks = [TimeMask(*mask) if mask else None for mask in (config.audio_mask_samples, config.video_mask_frames)]
    return Augmentation(mix, *masks, flip_probability=config.flip_probability)


def media_groups(samples: Sequence[Sample]) -> list[int]:
    """Number samples such that those with the same media have one number: as many images, and audio or video or not."""
    numbers: dict[tuple[int, ...], int] = {}
    media = [[part.medium for part in sample.media] for sample in samples]
    keys = [(of_sample.count("image"), "audio" in of_sample, "video" in of_sample) for of_sample in media]
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
    """Make a micro-batch, once it is sure that every row can meet the budgets; with the seconds it took, by `watch`.

    Args:
        budgets: the extremes of what is sampled.
        max_sample_tokens: where longer rows are cut, every medium at its largest budget; see `EncodedSample.cut`.
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
