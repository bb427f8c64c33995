"""Scans samples before training: how many tokens each costs, and whether there is anything to learn.

Knows conversations, headers of media files and budgets. Does not decode, and does not know batches.

The whole data set is scanned once, by the main process and as many others as it is given; the result is kept beside
the run under a digest of all that it depends on, so that a resumed run starts at once and what changed is scanned anew.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm.budget import Amount, Budget, Extent, Space
from mllm.config.reading import plain
from mllm.data.findings import ManyLines, first_lines
from mllm.data.manifest import Media, Sample
from mllm.data.skipped import too_many_bad
from mllm.media import MediaError, MediaLimits, resolve_media
from mllm.media.headers import header_seconds
from mllm.media.image import header_pixels
from mllm.media.packed import file_stamp
from mllm.processing.batch import EncodedSample, MediaSpan
from mllm.processing.chat import ChatEncoder, RefusedConversation
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.processor import ElasticProcessor
from mllm.training.pipeline.worker_process import prepare_worker
from mllm.utils.files import write_text_whole

CHUNK = 1024
"""Conversations that are tokenised in one call."""
PART = 4 * CHUNK
"""Samples of which one process takes care at a time."""
MIN_PARTS = 4
"""Fewer are scanned in less time than processes take to begin."""
FIRST_SCAN = 10_000
"""Of a larger data set so many samples, evenly sampled, are scanned first: a mistake shows within seconds."""
MAX_SHOWN = 5
_UNKNOWN_PIXELS = (224, 224)
"""Height and width of an image whose file cannot be read, which is left out when its turn comes."""
logger = logging.getLogger(__name__)
_forked: dict[str, Any] = {}
"""What the processes of a scan have from this one, while it goes on."""


@dataclass(frozen=True)
class TokenScan:
    """Holds per sample its tokens at the largest budgets and at the smallest, and how many of them are targets.

    `refused` says by id why the chat format has no place for a sample, which counts one token.
    """

    max_tokens: list[int]
    num_targets: list[int]
    min_tokens: list[int]
    refused: dict[str, str] = field(default_factory=dict)

    def check(
        self,
        samples: Sequence[Sample],
        *,
        tokens_per_batch: int,
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
        good, scan = self.without_refused(samples)
        ids, tokens = [sample.id for sample in good], scan.max_tokens
        logger.info("%s", target_report(ids, scan.num_targets))
        logger.info("tokens at the largest budget: median %d, most %d", statistics.median(tokens), max(tokens))
        check_targets(ids, scan.num_targets, max_unsupervised_fraction)
        counts = zip(samples, self.max_tokens, strict=True)
        if long := [(count, sample.id) for sample, count in counts if count > tokens_per_batch]:
            raise ValueError(
                f"data.tokens_per_batch is {tokens_per_batch}, but {len(long)} samples are longer at the largest "
                f"budget, up to {max(long)[0]} tokens (sample {max(long)[1]!r}); raise it, or cut them with "
                "data.max_sample_tokens"
            )

    def without_refused(self, samples: Sequence[Sample]) -> tuple[list[Sample], "TokenScan"]:
        """Leave out the samples that the chat format has no place for."""
        good = [number for number, sample in enumerate(samples) if sample.id not in self.refused]
        counts = (self.max_tokens, self.num_targets, self.min_tokens)
        max_tokens, num_targets, min_tokens = ([count[number] for number in good] for count in counts)
        return [samples[number] for number in good], TokenScan(max_tokens, num_targets, min_tokens)

    def _check_refused(self, num_samples: int, max_bad_fraction: float) -> None:
        if too_many_bad(len(self.refused), num_samples, max_bad_fraction):
            lines = first_lines([f"sample {sample_id!r}: {reason}" for sample_id, reason in self.refused.items()])
            summary = (
                f"{len(self.refused)} of {num_samples} samples are refused; data.max_bad_fraction allows "
                f"{max_bad_fraction:g} of them. Does model.chat_format fit the data?"
            )
            raise ManyLines("\n".join([*lines, summary]))


@dataclass(frozen=True)
class SampleTokens:
    """Measures one sample: tokens of its text, how many tokens are targets, and its media as far as headers tell; or
    says why the chat format has no place for it."""

    text_tokens: int
    num_targets: int
    extents: tuple[Extent, ...]
    refused: str | None = None

    def tokens(self, budget: Budget, space: Space) -> int:
        """Count all tokens at a budget; a medium it does not name is at its largest, one too short for it counts 1."""
        return self.tokens_with(SoftTokens(budget, space))

    def tokens_with(self, soft_tokens: "SoftTokens") -> int:
        """Count all tokens at the budget of a counter, which knows what other samples of the same media cost."""
        # A cut through media leaves less than nothing: it is refused when it is loaded.
        return max(self.text_tokens + soft_tokens(self.extents), 1)


class SoftTokens:
    """Counts the soft tokens of samples at one budget; those of media that are alike are counted once.

    Args:
        budget: a medium it does not name is at its largest; one that is too short for it counts 1.
    """

    def __init__(self, budget: Budget, space: Space) -> None:
        self.budget = budget
        self.space = space
        self._known: dict[tuple[Extent, ...], int] = {}

    def __call__(self, extents: tuple[Extent, ...]) -> int:
        """Count the soft tokens of a sample's media."""
        if (known := self._known.get(extents)) is None:
            known = self._known[extents] = self._count(extents)
        return known

    def _count(self, extents: tuple[Extent, ...]) -> int:
        row = EncodedSample("", (), (), tuple(MediaSpan(extent, 0) for extent in extents))
        try:
            return sum(max(count.tokens, 1) for count in row.token_counts(self.budget, self.space))
        except ValueError:  # too short for its budgets: found and left out when it is loaded
            amounts = [self.budget.amounts.get(extent.medium, Amount("max")) for extent in extents]
            return sum(
                _soft_tokens(extent, amount, self.space) for extent, amount in zip(extents, amounts, strict=True)
            )


def measure_samples(
    samples: Sequence[Sample],
    processor: ElasticProcessor,
    max_sample_tokens: int | None = None,
    host_answer_tokens: int = 0,
) -> list[SampleTokens]:
    """Measure every sample without decoding anything.

    Args:
        max_sample_tokens: where longer samples are cut; None cuts none.
        host_answer_tokens: most tokens of the answer that a sample without one is given later.

    Raises:
        ValueError: see `scan_tokens`.
    """
    measured: list[SampleTokens] = []
    largest = SoftTokens(processor.space.largest(), processor.space)
    shared: dict[tuple[Extent, ...], tuple[Extent, ...]] = {}  # most samples have media of a size that others have
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, counts in zip(chunk, _counts(chunk, processor.chat), strict=True):
            if isinstance(counts, str):
                measured.append(SampleTokens(1, 0, (), refused=counts))
            else:
                if sample.messages[-1].role != "assistant":
                    counts = counts[0] + host_answer_tokens, host_answer_tokens
                one = _measure(sample, *counts, processor, max_sample_tokens, largest)
                measured.append(replace(one, extents=shared.setdefault(one.extents, one.extents)))
    return measured


def scan_of(samples: Sequence[Sample], measured: Sequence[SampleTokens], space: Space) -> TokenScan:
    """Make the scan of samples that have been measured."""
    refused = {sample.id: one.refused for sample, one in zip(samples, measured, strict=True) if one.refused is not None}
    largest, smallest = SoftTokens(space.largest(), space), SoftTokens(space.smallest(), space)
    return TokenScan(
        max_tokens=[one.tokens_with(largest) for one in measured],
        num_targets=[one.num_targets for one in measured],
        min_tokens=[one.tokens_with(smallest) for one in measured],
        refused=refused,
    )


def target_report(ids: Sequence[str], targets: Sequence[int]) -> str:
    """Describe the target tokens of samples in one line, with the ids of some that have none."""
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
        ValueError: more than this fraction without a target token; some are named.
    """
    without = [sample_id for sample_id, count in zip(ids, targets, strict=True) if not count]
    if len(without) > max_unsupervised_fraction * len(ids):
        raise ValueError(
            f"{len(without)} of {len(ids)} samples have nothing to learn (no target token), such as {_some(without)}; "
            f"data.max_unsupervised_fraction allows {max_unsupervised_fraction:g} of them. Does model.chat_format fit "
            "the data?"
        )


def scan_tokens(
    samples: Sequence[Sample],
    processor: ElasticProcessor,
    *,
    cache_file: Path | None = None,
    max_sample_tokens: int | None = None,
    host_answer_tokens: int = 0,
    max_unsupervised_fraction: float = 1.0,
    processes: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScan:
    """Scan every sample.

    A stream's length is `meta.seconds` where the sample has it, else what the header of its file states. A file that
    cannot be read counts nothing: it is left out when its turn comes.

    Args:
        cache_file: the result is read from it when it is of these samples and this processor, and written to otherwise.
        max_sample_tokens, host_answer_tokens: see `measure_samples`.
        max_unsupervised_fraction: of a large data set, a part is checked against this first.
        processes: that share the work on a large data set; this process alone when below 2.
        progress: is called with how many of how many samples are scanned.

    Raises:
        ValueError: a medium the model does not take; the sample is named. Or too many samples of the first scan
            without a target token.
    """
    key = _key(samples, processor, max_sample_tokens, host_answer_tokens)
    if cache_file is not None and (known := _read(cache_file, key)) is not None:
        return known
    if len(samples) > FIRST_SCAN and not host_answer_tokens:
        first = [samples[number] for number in evenly_sampled(len(samples), FIRST_SCAN)]
        counts = count_targets(first, processor.chat)
        if counts:
            ids, targets = [sample_id for sample_id, _ in counts], [count for _, count in counts]
            logger.info("first scan: %s", target_report(ids, targets))
            check_targets(ids, targets, max_unsupervised_fraction)
    started = time.perf_counter()
    scan_part = partial(
        _scan_part, processor=processor, max_sample_tokens=max_sample_tokens, host_answer_tokens=host_answer_tokens
    )
    scan = _joined(_parts_of(samples, scan_part, processes), len(samples), progress)
    logger.info("scanned %.0f samples per second", len(samples) / max(time.perf_counter() - started, 1e-9))
    if cache_file is not None:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        values = {one.name: getattr(scan, one.name) for one in fields(TokenScan)}
        write_text_whole(cache_file, json.dumps({"key": key, **values}))
    return scan


def _scan_part(
    samples: Sequence[Sample], *, processor: ElasticProcessor, max_sample_tokens: int | None, host_answer_tokens: int
) -> TokenScan:
    return scan_of(samples, measure_samples(samples, processor, max_sample_tokens, host_answer_tokens), processor.space)


def _parts_of(
    samples: Sequence[Sample], scan_part: Callable[[Sequence[Sample]], TokenScan], processes: int
) -> Iterator[TokenScan]:
    """Scan a data set part by part, in order; a large one by several processes."""
    starts = range(0, len(samples), PART)
    if processes < 2 or len(starts) < MIN_PARTS or sys.platform != "linux":  # a fork is safe nowhere else
        yield from (scan_part(samples[start : start + PART]) for start in starts)
        return
    # Forked, so that samples and tokenizer are there without being copied; threads of a tokenizer would not survive.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _forked.update(samples=samples, scan_part=scan_part)
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(processes, len(starts)), context, prepare_worker, (0,)) as pool:
            yield from pool.map(_scan_forked, starts)
    finally:
        _forked.clear()


def _scan_forked(start: int) -> TokenScan:
    """Scan a part in a process that was forked with the samples."""
    return _forked["scan_part"](_forked["samples"][start : start + PART])


def _joined(parts: Iterable[TokenScan], num_samples: int, progress: Callable[[int, int], None] | None) -> TokenScan:
    whole = TokenScan([], [], [])
    for part in parts:
        whole.max_tokens.extend(part.max_tokens)
        whole.num_targets.extend(part.num_targets)
        whole.min_tokens.extend(part.min_tokens)
        whole.refused.update(part.refused)
        if progress is not None:
            progress(len(whole.max_tokens), num_samples)
    return whole


def evenly_sampled(num_samples: int, most: int) -> list[int]:
    """Choose numbers of at most so many samples, in order; always the same ones."""
    if num_samples <= most:
        return list(range(num_samples))
    return sorted(np.random.default_rng(0).choice(num_samples, most, replace=False).tolist())


def count_targets(samples: Sequence[Sample], chat: ChatEncoder) -> list[tuple[str, int]]:
    """Count the target tokens of each sample, by id, nothing cut; those the chat format has no place for are left out.

    Raises:
        ValueError: see `scan_tokens`.
    """
    targets = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, counts in zip(chunk, _counts(chunk, chat), strict=True):
            if not isinstance(counts, str):
                targets.append((sample.id, counts[1]))
    return targets


def _counts(samples: Sequence[Sample], chat: ChatEncoder) -> list[tuple[int, int] | str]:
    """Count ids and targets of each sample, or say why it is refused; where one is, each is tried alone to name it."""
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


def _measure(
    sample: Sample,
    num_ids: int,
    num_targets: int,
    processor: ElasticProcessor,
    max_sample_tokens: int | None,
    largest: SoftTokens,
) -> SampleTokens:
    """Measure a sample, cut where it is too long with its soft tokens at the largest budget."""
    extents = extents_of(sample, processor)
    whole = SampleTokens(num_ids - len(extents) + _num_tags(sample, processor), num_targets, extents)
    if max_sample_tokens is None or (num_beyond := whole.tokens_with(largest) - max_sample_tokens) <= 0:
        return whole
    prompt = processor.chat(sample.messages)
    kept_labels = prompt.labels[: max(len(prompt.ids) - num_beyond, 0)]
    num_kept_targets = sum(label != IGNORED_LABEL for label in kept_labels)
    return SampleTokens(whole.text_tokens - num_beyond, num_kept_targets, extents)


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(sample_id) for sample_id in ids[:MAX_SHOWN])
    return f"{shown} and {len(ids) - MAX_SHOWN} more" if len(ids) > MAX_SHOWN else shown


def extents_of(sample: Sample, processor: ElasticProcessor) -> tuple[Extent, ...]:
    """Measure the media of a sample as far as headers tell."""
    return tuple(_extent(part, sample, processor) for part in sample.media)


def _extent(part: Media, sample: Sample, processor: ElasticProcessor) -> Extent:
    facts, space = processor.facts[part.medium], processor.space.media[part.medium]
    if part.medium == "image" and (space.tiling is not None or space.resizing is not None):
        unknown = facts.image_pixels or _UNKNOWN_PIXELS
        return processor.image_extent(_image_pixels(part, sample, processor.limits) or unknown)
    if processor.host is not None and part.medium == "image":
        size = processor.host.size_of(*(_image_pixels(part, sample, processor.limits) or _UNKNOWN_PIXELS))
        return Extent(part.medium, grid=size.grid, num_images=size.num_images)
    if facts.grid is not None:
        frames = processor.sampling[part.medium].count if part.medium in processor.sampling else 1
        return Extent(part.medium, grid=facts.grid, num_images=frames)
    assert facts.frames_per_second is not None
    seconds = _seconds(part, sample, processor.limits)
    if processor.host is not None and processor.host.family.clips is not None:
        frames = processor.host.family.clips.num_tokens(seconds)
    else:
        frames = round(seconds * facts.frames_per_second)
    return Extent(part.medium, num_frames=frames, frames_per_second=facts.frames_per_second)


def _num_tags(sample: Sample, processor: ElasticProcessor) -> int:
    """Count the tokens that a host puts between and around the soft tokens of the images of a sample."""
    if processor.host is None or processor.host.medium != "image":
        return 0
    sizes = [_image_pixels(part, sample, processor.limits) or _UNKNOWN_PIXELS for part in sample.media]
    return sum(processor.host.size_of(*size).num_tags for size in sizes)


def _soft_tokens(extent: Extent, amount: Amount, space: Space) -> int:
    """Count soft tokens of one medium; at least one."""
    try:
        return max(space.media[extent.medium].count(amount, extent).tokens, 1)
    except ValueError:  # too short for its budgets: found and left out when it is loaded
        return 1


def _image_pixels(part: Media, sample: Sample, limits: MediaLimits) -> tuple[int, int] | None:
    """Read height and width as the header states them."""
    try:
        return header_pixels(resolve_media(sample.root, part.path), limits=limits)
    except MediaError as error:
        logger.debug("no size of sample %r: %s", sample.id, error)
        return None


def _seconds(part: Media, sample: Sample, limits: MediaLimits) -> float:
    if (stated := _stated_seconds(sample)) is not None:
        return stated
    try:
        return header_seconds(part.medium, resolve_media(sample.root, part.path), limits=limits)
    except MediaError as error:
        logger.debug("no length of sample %r: %s", sample.id, error)
        return 0.0


def _key(
    samples: Sequence[Sample], processor: ElasticProcessor, max_sample_tokens: int | None, host_answer_tokens: int
) -> str:
    """Compute a digest of what a scan depends on: the conversations and what shapes their tokens."""
    digest = hashlib.sha256(json.dumps(_shaping(processor), sort_keys=True, default=str).encode())
    digest.update(_tokenizer_text(processor).encode())
    digest.update(f"{max_sample_tokens} {host_answer_tokens} {processor.limits}".encode())
    measured = _measured_media(processor)
    for sample in samples:
        media = measured if _stated_seconds(sample) is None else measured & {"image"}
        stamps = [file_stamp(os.path.join(sample.root, part.path)) for part in sample.media if part.medium in media]
        digest.update(repr((sample.id, sample.messages, sorted(sample.meta.items(), key=str), stamps)).encode())
    return digest.hexdigest()


def _tokenizer_text(processor: ElasticProcessor) -> str:
    """Write out all that a tokenizer and its template make tokens by."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        values = tokenizer.get_vocab()
    else:
        values = json.loads(backend.to_str())
        values = {key: value for key, value in values.items() if key not in ("truncation", "padding")}  # of calls
    return json.dumps([values, tokenizer.chat_template, processor.chat_template], sort_keys=True, default=str)


def _measured_media(processor: ElasticProcessor) -> set[str]:
    """Name the media whose tokens depend on what the headers of files say."""
    streams = {medium for medium, facts in processor.facts.items() if facts.grid is None}
    is_free = processor.host is not None or processor.loads_by_budget
    return (streams | {"image"}) & set(processor.space.media) if is_free else streams - {"image"}


def _stated_seconds(sample: Sample) -> float | None:
    """Return the length that a row states of its streams."""
    stated = sample.meta.get("seconds")
    return float(stated) if isinstance(stated, int | float) and stated > 0 else None


def _shaping(processor: ElasticProcessor) -> list[Any]:
    """What the tokens of a conversation depend on, as plain values."""
    encoders = {medium: config.to_dict() for medium, config in processor.encoder_configs.items()}
    return [plain(processor.settings), plain(processor.media), plain(vars(processor.expert_names)), encoders]


def _read(cache_file: Path, key: str) -> TokenScan | None:
    try:
        values = json.loads(cache_file.read_text(encoding="utf-8"))
        if values["key"] != key:
            return None
        return TokenScan(**{one.name: values[one.name] for one in fields(TokenScan)})
    except (OSError, ValueError, KeyError):
        return None
