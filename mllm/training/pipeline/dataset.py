"""Loads and checks a run's data before its model is built: rows, files, noise, conversations, and budgets for them.

A mistake in the data shows within seconds, not after an LLM has been loaded.

Knows the data of a run and its processor. Does not know weights or batches.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState

from mllm.adapters.expert_ids import ExpertNames
from mllm.budget import Budget, Space
from mllm.budget.sampler import BudgetSampler
from mllm.checkpoints.build import build_processor
from mllm.config.model import GatedLoraConfig
from mllm.config.run import DataConfig, RunConfig
from mllm.data.findings import ManyLines, first_lines
from mllm.data.manifest import Sample
from mllm.data.readers import missing_media
from mllm.data.shard_stream import Shards
from mllm.data.skipped import SkipLog, SkippedSample, too_many_bad
from mllm.processing.processor import ElasticProcessor
from mllm.training.feature_cache.building import FeatureSamples, check_folder, with_captions
from mllm.training.pipeline.loaders import SKIPPED_FILE, build_augmentation, read_samples
from mllm.training.pipeline.stream import find_shards, first_samples
from mllm.training.pipeline.token_scan import TokenScan, scan_tokens
from mllm.training.progress import counted, reporting
from mllm.utils.collector import collector_paused

SCANS = "token_scan"
"""Folder of a run that holds the token counts of its samples."""
logger = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """Holds the samples of a run and their token counts, by the key of `data` that names them; of a stream its
    `shards` in place of both for `train`.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    scans: dict[str, TokenScan] = field(default_factory=dict)
    shards: Shards | None = None

    def for_features(self) -> FeatureSamples:
        """List the samples whose features a run reads.

        Raises:
            ValueError: see `with_captions`.
        """
        train = with_captions(self.samples["train"], self.samples.get("captions", []))
        return FeatureSamples(train, self.samples.get("validation", []))


@collector_paused()
def load_dataset(
    config: RunConfig, *, fits_captions: bool = True, commits: Mapping[str, str] | None = None
) -> TrainingData:
    """Read and check everything that a run trains on, validates on and fits its projectors to; every process does.

    The token counts of all samples are kept in the run folder, `train.out`.

    Args:
        fits_captions: whether projectors are going to be fitted to `data.captions`.
        commits: see `find_shards`.

    Raises:
        ValueError: what is wrong, with the key, the rows or the files.
        OSError: a manifest cannot be read.
    """
    data, dataset = config.data, TrainingData()
    fits_captions = fits_captions and bool(data.captions)
    if fits_captions and "compressors" not in config.parts:
        raise ValueError(f"data.captions fits projectors, but train.parts {list(config.parts)} keeps them frozen")
    build_augmentation(data)  # noise that cannot be mixed is refused here
    if data.features is not None:
        check_folder(config)
    if data.stream is not None:
        dataset.shards = find_shards(config, commits)
    for name in ("train", "validation", *(["captions"] if fits_captions else [])):
        if (manifests := getattr(data, name)) and (name != "train" or dataset.shards is None):
            dataset.samples[name] = read_samples(manifests, data)
            fraction = data.max_bad_fraction if name == "train" else 0.0
            check_files(dataset.samples[name], name, fraction, is_shown=_shows(config))
    if data.features is not None:
        dataset.for_features()  # two samples of one id are refused here
    processor = build_processor(config.model, limits=data.limits)
    if dataset.shards is None:
        samples = dataset.samples["train"]
    else:
        samples = first_samples(dataset.shards, processor, data, config.train.seed)
    _check_tasks(samples, config, is_whole=dataset.shards is None)
    check_experts(samples, build_sampler(config, processor.space), processor.expert_names)
    run = Path(config.train.out).expanduser()
    for name, samples in dataset.samples.items():
        cache_file = run / SCANS / f"{name}.json"
        fraction = data.max_bad_fraction if name == "train" else 0.0
        scan = _scanned(samples, processor, data, cache_file, fraction, is_shown=_shows(config))
        if PartialState().is_main_process:
            _list_refused(scan, run, len(samples))
        # They would be found in a batch too, but there they could be alone, and a batch must not be empty.
        dataset.samples[name], dataset.scans[name] = scan.without_refused(samples)
    return dataset


def _check_tasks(samples: Sequence[Sample], config: RunConfig, *, is_whole: bool) -> None:
    """Refuse weights of tasks that the samples have not, or the first ones of a stream."""
    tasks = sorted({sample.task for sample in samples})
    if unknown := sorted(set(config.train.task_weights) - set(tasks)):
        which = "samples" if is_whole else f"first {len(samples)} samples (data.stream.shuffle_samples)"
        raise ValueError(f"train.task_weights names {unknown[0]!r}; the {which} have: {', '.join(tasks)}")


def _shows(config: RunConfig) -> bool:
    """Tell whether this process shows bars."""
    return config.train.progress and PartialState().is_main_process


def _list_refused(scan: TokenScan, run: Path, num_samples: int) -> None:
    """List samples that the chat format has no place for where a run lists what it leaves out."""
    bad = [
        SkippedSample(sample_id, 0, "unusable", "", f"sample {sample_id!r}: {reason}")
        for sample_id, reason in scan.refused.items()
    ]
    if bad:
        SkipLog(run / SKIPPED_FILE.format(rank=0), max_bad_fraction=1.0, min_seen=num_samples).note(len(bad), bad)


def build_sampler(config: RunConfig, space: Space) -> BudgetSampler:
    """Build what samples the budgets of a run's steps."""
    sampler = config.sampler
    return BudgetSampler(
        space,
        sampler.mode,
        num_budgets=sampler.num_budgets,
        seed=config.train.seed,
        points=tuple(sampler.budgets),
        is_gated=isinstance(config.model.adapter, GatedLoraConfig),
        max_image_tokens=tuple(sampler.max_image_tokens),
    )


def extreme_budgets(sampler: BudgetSampler) -> list[Budget]:
    """List budgets that a sample must meet, and its media be loaded at, so that it meets whatever is sampled."""
    largest, smallest = sampler.space.largest(), sampler.space.smallest()
    between = [replace(largest, num_frames=count) for count in sampler.space.frame_counts[1:-1]]
    seen = [budget for most in sampler.max_image_tokens for budget in sampler.seen_at(most, sampler.space.media)]
    return list(sampler.points) or [largest, *between, *seen, smallest]


def check_files(samples: Sequence[Sample], name: str, max_bad_fraction: float, *, is_shown: bool = False) -> None:
    """Check by one look-up per file that media are there and may be opened.

    Args:
        name: the key of `data` that names the samples.
        max_bad_fraction: how many samples may lack one; they are left out when their turn comes.
        is_shown: shows a bar where it takes long.

    Raises:
        ManyLines: more do; the first are named.
    """
    counting = counted(samples, f"looking up files of {name}", is_shown=is_shown)
    missing = list(missing_media(counting))
    if not missing:
        return
    num_bad = len({sample.id for sample, _ in missing})
    lines = first_lines([message for _, message in missing])
    summary = f"data.{name}: {num_bad} of {len(samples)} samples lack a file"
    if too_many_bad(num_bad, len(samples), max_bad_fraction):
        allowed = f"data.max_bad_fraction allows {max_bad_fraction:g}" if max_bad_fraction else "every one is needed"
        raise ManyLines("\n".join([*lines, f"{summary}; {allowed}"]))
    logger.warning("%s and are left out:\n%s", summary, "\n".join(lines))


def check_experts(samples: Sequence[Sample], sampler: BudgetSampler, experts: ExpertNames) -> None:
    """Check that every scale some step may sample for some sample has an expert of the adapter, before the first step.

    Raises:
        ValueError: one that has none; it is named, with a sample.
    """
    if not experts.scales or experts.is_gate:  # a gate has one for every budget below the full one
        return
    by_media = {tuple(sorted({part.medium for part in sample.media})): sample.id for sample in samples}
    for media, sample_id in by_media.items():
        for budget in sampler.possible(media) if media else []:
            if budget.total_tokens is None and str(Budget(budget.amounts)) not in experts.scales:
                raise ValueError(
                    f"sampler.mode {sampler.mode} may sample {budget} for samples such as {sample_id!r}, and "
                    f"adapter.scales has no such expert; it has {' | '.join(experts.scales)}"
                )


def _scanned(
    samples: list[Sample],
    processor: ElasticProcessor,
    data: DataConfig,
    cache_file: Path,
    max_bad_fraction: float,
    *,
    is_shown: bool,
) -> TokenScan:
    """Scan by the main process and its workers, while the others read what it found; log and check the result."""
    bar = reporting(f"counting tokens of {cache_file.stem}", is_shown=is_shown)
    with PartialState().main_process_first(), bar as report:
        scan = scan_tokens(
            samples,
            processor,
            cache_file=cache_file,
            max_sample_tokens=data.max_sample_tokens,
            host_answer_tokens=data.host_answer_tokens or 0,
            max_unsupervised_fraction=data.max_unsupervised_fraction,
            processes=data.num_workers,
            progress=report,
        )
    scan.check(
        samples,
        tokens_per_batch=data.tokens_per_batch,
        max_unsupervised_fraction=data.max_unsupervised_fraction,
        max_bad_fraction=max_bad_fraction,
    )
    return scan
