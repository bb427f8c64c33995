"""Looks a run's data over before its model is built: rows, files, noise, conversations, and what the sampler may draw.

A mistake in the data shows within seconds, not after an LLM has been loaded.

Knows the data of a run and its processor. Does not know weights or batches.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from mllm.adapters.expert_ids import ExpertNames
from mllm.budget import Budget, Space
from mllm.budget.sampler import Sampler
from mllm.checkpoints.build import build_processor
from mllm.config.run import DataConfig, RunConfig
from mllm.data.findings import ManyLines, first_lines
from mllm.data.manifest import Sample
from mllm.data.readers import missing_media
from mllm.data.skipped import SkipLog, SkippedSample, too_many_bad
from mllm.processing.processor import ElasticProcessor
from mllm.training.feature_cache.building import FeatureSamples, with_captions
from mllm.training.pipeline.loaders import SKIPPED_FILE, build_augmentation, read_samples
from mllm.training.pipeline.token_scan import Survey, survey

logger = logging.getLogger(__name__)


@dataclass
class LookedOver:
    """The samples of a run and what is known of them, by the key of `data` that names them."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    surveys: dict[str, Survey] = field(default_factory=dict)

    def for_features(self) -> FeatureSamples:
        """The samples whose features a run reads.

        Raises:
            ValueError: see `with_captions`.
        """
        train = with_captions(self.samples["train"], self.samples.get("captions", []))
        return FeatureSamples(train, self.samples.get("validation", []))


def look_over(settings: RunConfig, run: Path, *, fits_captions: bool) -> LookedOver:
    """Read and check everything that a run is told to train, validate and fit its projectors on; every process does.

    Args:
        run: the run folder, which keeps the surveys.
        fits_captions: whether projectors are going to be fitted to `data.captions`.

    Raises:
        ValueError: what is wrong, with the key, the rows or the files.
        OSError: a manifest cannot be read.
    """
    data, found = settings.data, LookedOver()
    build_augmentation(data)  # noise that cannot be mixed is refused here
    for name in ("train", "validation", *(["captions"] if fits_captions else [])):
        if manifests := getattr(data, name):
            found.samples[name] = read_samples(manifests, data)
            check_files(found.samples[name], name, data.max_bad_fraction if name == "train" else 0.0)
    samples = found.samples["train"]
    tasks = sorted({sample.task for sample in samples})
    if unknown := sorted(set(settings.train.task_weights) - set(tasks)):
        raise ValueError(f"train.task_weights names {unknown[0]!r}; the samples have: {', '.join(tasks)}")
    processor = build_processor(settings.model, limits=data.limits)
    check_members(samples, build_sampler(settings, processor.space), processor.expert_names)
    for name, own in found.samples.items():
        kept = run / "survey" / f"{name}.json"
        surveyed = _surveyed(own, processor, data, kept, data.max_bad_fraction if name == "train" else 0.0)
        if PartialState().is_main_process:
            _list_refused(surveyed, run, len(own))
        # They would be found in a batch too, but there they could be alone, and a batch must not be empty.
        found.samples[name], found.surveys[name] = surveyed.without_refused(own)
    if data.features is not None:
        found.for_features()  # two samples of one id are refused here
    return found


def _list_refused(surveyed: Survey, run: Path, num_samples: int) -> None:
    """List samples that the chat format has no place for where a run lists what it leaves out."""
    bad = [
        SkippedSample(sample_id, 0, "unusable", "", f"sample {sample_id!r}: {reason}")
        for sample_id, reason in surveyed.refused.items()
    ]
    if bad:
        SkipLog(run / SKIPPED_FILE.format(rank=0), max_bad_fraction=1.0, min_seen=num_samples).note(len(bad), bad)


def build_sampler(settings: RunConfig, space: Space) -> Sampler:
    """The draws of a run."""
    own = settings.sampler
    return Sampler(space, own.mode, num_draws=own.num_draws, seed=settings.train.seed, points=tuple(own.budgets))


def check_files(samples: Sequence[Sample], name: str, max_bad_fraction: float) -> None:
    """See by one look-up per file that media are there and may be opened.

    Args:
        name: the key of `data` that names the samples.
        max_bad_fraction: how many samples may lack one; they are left out when their turn comes.

    Raises:
        ManyLines: more do; the first are named.
    """
    missing = list(missing_media(samples))
    if not missing:
        return
    num_bad = len({sample.id for sample, _ in missing})
    lines = first_lines([message for _, message in missing])
    told = f"data.{name}: {num_bad} of {len(samples)} samples lack a file"
    if too_many_bad(num_bad, len(samples), max_bad_fraction):
        allowed = f"data.max_bad_fraction allows {max_bad_fraction:g}" if max_bad_fraction else "every one is needed"
        raise ManyLines("\n".join([*lines, f"{told}; {allowed}"]))
    logger.warning("%s and are left out:\n%s", told, "\n".join(lines))


def check_members(samples: Sequence[Sample], draws: Sampler, members: ExpertNames) -> None:
    """See that every scale some step may draw for some sample has a expert of the adapter, before the first step.

    Raises:
        ValueError: one that has none; it is named, with a sample.
    """
    if not members.scales:
        return
    by_media = {tuple(sorted({part.medium for part in sample.media})): sample.id for sample in samples}
    for media, sample_id in by_media.items():
        for budget in draws.possible(media) if media else []:
            if budget.total_tokens is None and str(Budget(budget.amounts)) not in members.scales:
                raise ValueError(
                    f"sampler.mode {draws.mode} may draw {budget} for samples such as {sample_id!r}, and adapter.scales"
                    f" has no such expert; it has {' | '.join(members.scales)}"
                )


def _surveyed(
    samples: list[Sample], processor: ElasticProcessor, data: DataConfig, kept: Path, max_bad_fraction: float
) -> Survey:
    """Surveyed by the main process; the others read what it found. What was found is logged and checked."""
    with PartialState().main_process_first():
        found = survey(
            samples,
            processor,
            kept=kept,
            max_sample_tokens=data.max_sample_tokens,
            max_unsupervised_fraction=data.max_unsupervised_fraction,
        )
    found.check(
        samples,
        max_tokens=data.tokens_per_batch,
        max_unsupervised_fraction=data.max_unsupervised_fraction,
        max_bad_fraction=max_bad_fraction,
    )
    return found
