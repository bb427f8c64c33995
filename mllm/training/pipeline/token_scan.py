"""What is known of the samples before training: how many tokens each costs, and whether there is anything to learn.

Knows conversations, headers of media files and budgets. Does not decode, and does not know batches.

The whole data set is looked at once, by the main process; the result is kept beside the run, so that a resumed run
starts at once.
"""

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mllm.budget import Amount, Budget, Extent, Space
from mllm.data.findings import ManyLines, first_lines
from mllm.data.manifest import Media, Sample
from mllm.data.skipped import too_many_bad
from mllm.media import MediaError, MediaLimits, resolve_media
from mllm.media.headers import header_seconds
from mllm.media.image import header_pixels
from mllm.processing.batch import Row, Run
from mllm.processing.chat import ChatEncoder, RefusedConversation
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.processor import ElasticProcessor

CHUNK = 1024
"""Conversations that are tokenised in one call."""
FIRST_LOOK = 10_000
"""Of a larger data set so many samples, evenly drawn, are looked at first: a mistake shows within seconds."""
MAX_SHOWN = 5
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Per sample its tokens at the largest budgets and at the smallest, and how many of them are targets.

    `refused` says by id why the chat format has no place for a sample, which counts one token.
    """

    tokens: list[int]
    targets: list[int]
    smallest: list[int]
    refused: dict[str, str] = field(default_factory=dict)

    def check(
        self,
        samples: Sequence[Sample],
        *,
        max_tokens: int,
        max_unsupervised_fraction: float,
        max_bad_fraction: float = 0.0,
    ) -> None:
        """Log what was found, and refuse data that would train nothing, or that no batch can hold.

        Args:
            max_bad_fraction: how many samples may be refused; of small data sets, of as many as `SkipLog` counts.

        Raises:
            ValueError: too many refused samples, or samples without a target token, or a sample of too many tokens.
        """
        self._check_refused(len(samples), max_bad_fraction)
        good, own = self.without_refused(samples)
        ids = [sample.id for sample in good]
        logger.info("%s", target_report(ids, own.targets))
        logger.info("tokens at the largest budget: median %d, most %d", statistics.median(own.tokens), max(own.tokens))
        check_targets(ids, own.targets, max_unsupervised_fraction)
        long = [(tokens, sample.id) for sample, tokens in zip(samples, self.tokens, strict=True) if tokens > max_tokens]
        if long:
            raise ValueError(
                f"data.tokens_per_batch is {max_tokens}, but {len(long)} samples are longer at the largest budget, "
                f"up to {max(long)[0]} tokens (sample {max(long)[1]!r}); raise it, or cut them with "
                "data.max_sample_tokens"
            )

    def without_refused(self, samples: Sequence[Sample]) -> tuple[list[Sample], "Survey"]:
        """The samples that the chat format has a place for, and what is known of them."""
        good = [number for number, sample in enumerate(samples) if sample.id not in self.refused]
        tokens, targets, smallest = (
            [own[number] for number in good] for own in (self.tokens, self.targets, self.smallest)
        )
        return [samples[number] for number in good], Survey(tokens, targets, smallest)

    def _check_refused(self, num_samples: int, max_bad_fraction: float) -> None:
        if too_many_bad(len(self.refused), num_samples, max_bad_fraction):
            lines = first_lines([f"sample {sample_id!r}: {reason}" for sample_id, reason in self.refused.items()])
            told = (
                f"{len(self.refused)} of {num_samples} samples are refused; data.max_bad_fraction allows "
                f"{max_bad_fraction:g} of them. Does model.chat_format fit the data?"
            )
            raise ManyLines("\n".join([*lines, told]))


@dataclass(frozen=True)
class Looked:
    """One sample: tokens of its text, how many tokens are targets, and its media as far as headers tell; or why the
    chat format has no place for it."""

    text_tokens: int
    targets: int
    extents: tuple[Extent, ...]
    refused: str | None = None

    def tokens(self, budget: Budget, space: Space) -> int:
        """All tokens at a budget; a medium it does not name is at its largest, one too short for it counts one."""
        row = Row("", (), (), tuple(Run(extent, 0) for extent in self.extents))
        try:
            soft = sum(max(cost.tokens, 1) for cost in row.token_counts(budget, space))
        except ValueError:  # too short for its budgets: found and left out when it is loaded
            soft = sum(_soft(own, budget.amounts.get(own.medium, Amount("max")), space) for own in self.extents)
        return max(self.text_tokens + soft, 1)  # a cut through media leaves less: refused when it is loaded


def look_all(
    samples: Sequence[Sample], processor: ElasticProcessor, max_sample_tokens: int | None = None
) -> list[Looked]:
    """Every sample, without decoding anything.

    Raises:
        ValueError: see `survey`.
    """
    found: list[Looked] = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, counts in zip(chunk, _counts(chunk, processor.chat), strict=True):
            if isinstance(counts, str):
                found.append(Looked(1, 0, (), refused=counts))
            else:
                found.append(_look(sample, *counts, processor, max_sample_tokens))
    return found


def survey_of(samples: Sequence[Sample], looked: Sequence[Looked], space: Space) -> Survey:
    """The survey of samples that have been looked at."""
    largest, smallest = ([one.tokens(at, space) for one in looked] for at in (space.largest(), space.smallest()))
    refused = {sample.id: one.refused for sample, one in zip(samples, looked, strict=True) if one.refused is not None}
    return Survey(largest, [one.targets for one in looked], smallest, refused)


def target_report(ids: Sequence[str], targets: Sequence[int]) -> str:
    """One line on the target tokens of samples, with the ids of some that have none."""
    without = [sample_id for sample_id, count in zip(ids, targets, strict=True) if not count]
    line = (
        f"{len(targets)} samples; target tokens per sample: least {min(targets)}, median "
        f"{statistics.median(targets):g}, mean {statistics.fmean(targets):.1f}, most {max(targets)}; "
        f"{len(without)} without"
    )
    return f"{line} ({_some(without)})" if without else line


def check_targets(ids: Sequence[str], targets: Sequence[int], max_unsupervised_fraction: float) -> None:
    """Refuse samples too many of which would train nothing.

    Raises:
        ValueError: more than this share without a target token; some are named.
    """
    without = [sample_id for sample_id, count in zip(ids, targets, strict=True) if not count]
    if len(without) > max_unsupervised_fraction * len(ids):
        raise ValueError(
            f"{len(without)} of {len(ids)} samples have nothing to learn (no target token), such as {_some(without)}; "
            f"data.max_unsupervised_fraction allows {max_unsupervised_fraction:g} of them. Does model.chat_format fit "
            "the data?"
        )


def survey(
    samples: Sequence[Sample],
    processor: ElasticProcessor,
    *,
    kept: Path | None = None,
    max_sample_tokens: int | None = None,
    max_unsupervised_fraction: float = 1.0,
) -> Survey:
    """Look at every sample.

    A stream's length is `meta.seconds` where the sample has it, else what the header of its file states. A file that
    cannot be read counts nothing: it is left out when its turn comes.

    Args:
        kept: file the result is read from when it is of these samples and this processor, and written to otherwise.
        max_sample_tokens: where longer samples are cut; nothing cuts none.
        max_unsupervised_fraction: of a large data set, a part is checked against this first.

    Raises:
        ValueError: a medium the model does not take; the sample is named. Or too many samples of the first look
            without a target token.
    """
    key = _key(samples, processor, max_sample_tokens)
    if kept is not None and (found := _read(kept, key)) is not None:
        return found
    if len(samples) > FIRST_LOOK:
        first = [samples[number] for number in drawn(len(samples), FIRST_LOOK)]
        seen = count_targets(first, processor.chat)
        if seen:
            ids, targets = [sample_id for sample_id, _ in seen], [count for _, count in seen]
            logger.info("first look: %s", target_report(ids, targets))
            check_targets(ids, targets, max_unsupervised_fraction)
    started = time.perf_counter()
    result = survey_of(samples, look_all(samples, processor, max_sample_tokens), processor.space)
    logger.info("surveyed %.0f samples per second", len(samples) / max(time.perf_counter() - started, 1e-9))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(".part")
        aside.write_text(json.dumps({"key": key, **asdict(result)}), encoding="utf-8")
        aside.replace(kept)
    return result


def drawn(num_samples: int, most: int) -> list[int]:
    """Numbers of at most so many samples, in order; always the same ones."""
    if num_samples <= most:
        return list(range(num_samples))
    return sorted(np.random.default_rng(0).choice(num_samples, most, replace=False).tolist())


def count_targets(samples: Sequence[Sample], chat: ChatEncoder) -> list[tuple[str, int]]:
    """Id and target tokens of each sample, nothing cut; those that the chat format has no place for are left out.

    Raises:
        ValueError: see `survey`.
    """
    found = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, counts in zip(chunk, _counts(chunk, chat), strict=True):
            if not isinstance(counts, str):
                found.append((sample.id, counts[1]))
    return found


def _counts(samples: Sequence[Sample], chat: ChatEncoder) -> list[tuple[int, int] | str]:
    """Ids and targets of each sample, or why it is refused; where some are, all are tried one by one to name them."""
    try:
        return [*chat.count_all([sample.messages for sample in samples])]
    except ValueError:
        return [_count(sample, chat) for sample in samples]


def _count(sample: Sample, chat: ChatEncoder) -> tuple[int, int] | str:
    try:
        return chat.count_all([sample.messages])[0]
    except RefusedConversation as error:
        return str(error)
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: {error}") from error


def _look(
    sample: Sample, num_ids: int, num_targets: int, processor: ElasticProcessor, max_sample_tokens: int | None
) -> Looked:
    """What is known of a sample, cut where it is too long."""
    extents = extents_of(sample, processor)
    looked = Looked(num_ids - len(extents), num_targets, extents)
    beyond = looked.tokens(processor.space.largest(), processor.space) - (max_sample_tokens or 0)
    if max_sample_tokens is None or beyond <= 0:
        return looked
    prompt = processor.chat(sample.messages)
    last = max(len(prompt.ids) - beyond, 0)
    return Looked(looked.text_tokens - beyond, sum(label != IGNORED_LABEL for label in prompt.labels[:last]), extents)


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(sample_id) for sample_id in ids[:MAX_SHOWN])
    return f"{shown} and {len(ids) - MAX_SHOWN} more" if len(ids) > MAX_SHOWN else shown


def extents_of(sample: Sample, processor: ElasticProcessor) -> tuple[Extent, ...]:
    """The media of a sample as far as headers tell."""
    return tuple(_extent(part, sample, processor) for part in sample.media)


def _extent(part: Media, sample: Sample, processor: ElasticProcessor) -> Extent:
    facts, space = processor.facts[part.medium], processor.space.media[part.medium]
    if part.medium == "image" and space.tiling is not None:
        return processor.image_extent(_image_pixels(part, sample, processor.limits) or facts.image_pixels or (1, 1))
    if facts.grid is not None:
        frames = processor.sampling[part.medium].count if part.medium in processor.sampling else 1
        return Extent(part.medium, grid=facts.grid, num_images=frames)
    assert facts.frames_per_second is not None
    frames = round(_seconds(part, sample, processor.limits) * facts.frames_per_second)
    return Extent(part.medium, num_frames=frames, frames_per_second=facts.frames_per_second)


def _soft(extent: Extent, amount: Amount, space: Space) -> int:
    """Soft tokens of one medium; at least one."""
    try:
        return max(space.media[extent.medium].count(amount, extent).tokens, 1)
    except ValueError:  # too short for its budgets: found and left out when it is loaded
        return 1


def _image_pixels(part: Media, sample: Sample, limits: MediaLimits) -> tuple[int, int] | None:
    """Height and width as the header states them."""
    try:
        return header_pixels(resolve_media(sample.root, part.path), limits=limits)
    except MediaError as error:
        logger.debug("no size of sample %r: %s", sample.id, error)
        return None


def _seconds(part: Media, sample: Sample, limits: MediaLimits) -> float:
    stated = sample.meta.get("seconds")
    if isinstance(stated, int | float) and stated > 0:
        return float(stated)
    try:
        return header_seconds(part.medium, resolve_media(sample.root, part.path), limits=limits)
    except MediaError as error:
        logger.debug("no length of sample %r: %s", sample.id, error)
        return 0.0


def _key(samples: Sequence[Sample], processor: ElasticProcessor, max_sample_tokens: int | None) -> str:
    """What the result depends on: the conversations and what shapes their tokens."""
    digest = hashlib.sha256(json.dumps(_plain(processor.elastic), sort_keys=True, default=str).encode())
    digest.update(f"{len(processor.tokenizer)} {max_sample_tokens} {processor.limits}".encode())
    for sample in samples:
        digest.update(repr((sample.id, sample.messages, sorted(sample.meta.items(), key=str))).encode())
    return digest.hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _read(kept: Path, key: str) -> Survey | None:
    try:
        values = json.loads(kept.read_text(encoding="utf-8"))
        return Survey(**{own.name: values[own.name] for own in fields(Survey)}) if values["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None
