"""What is known of the samples before training: how many tokens each costs, and whether there is anything to learn.

Knows conversations, headers of media files and budgets. Does not decode, and does not know batches.

The whole data set is looked at once, by the main process; the result is kept beside the run, so that a resumed run
starts at once.
"""

import hashlib
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm.budget import Amount, Budget, Extent, Space
from mllm.data.manifest import Media, Sample
from mllm.media import MediaError, resolve_media
from mllm.media.lengths import header_seconds
from mllm.processing import ElasticProcessor
from mllm.splice import IGNORED_LABEL

MAX_UNSUPERVISED = 0.01
"""More than this share of samples without a single target token is a mistake in the data or in the chat format."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Per sample its tokens at the largest budgets and at the smallest, and how many of them are targets."""

    tokens: list[int]
    targets: list[int]
    smallest: list[int]

    def check(self, samples: Sequence[Sample], max_tokens: int) -> None:
        """Refuse data that would train nothing, or that no batch can hold, and log what was found.

        Raises:
            ValueError: more than 1 % of the samples without a target token, or a sample of too many tokens.
        """
        without = [sample.id for sample, targets in zip(samples, self.targets, strict=True) if targets == 0]
        if len(without) > MAX_UNSUPERVISED * len(samples):
            raise ValueError(
                f"{len(without)} of {len(samples)} samples have nothing to learn (no target token), such as "
                f"{without[0]!r}; does model.chat_format fit the data?"
            )
        long = [(tokens, sample.id) for sample, tokens in zip(samples, self.tokens, strict=True) if tokens > max_tokens]
        if long:
            raise ValueError(
                f"data.tokens_per_batch is {max_tokens}, but {len(long)} samples are longer at the largest budget, "
                f"up to {max(long)[0]} tokens ({max(long)[1]!r})"
            )
        logger.info(
            "%d samples; target tokens per sample: least %d, median %d, most %d; %d without; tokens at the largest "
            "budget: median %d, most %d",
            *(len(samples), min(self.targets), statistics.median(self.targets), max(self.targets), len(without)),
            *(statistics.median(self.tokens), max(self.tokens)),
        )


@dataclass(frozen=True)
class Looked:
    """One sample: tokens of its text, how many tokens are targets, and its media as far as headers tell."""

    text_tokens: int
    targets: int
    extents: tuple[Extent, ...]

    def tokens(self, budget: Budget, space: Space) -> int:
        """All tokens at a budget; a medium it does not name is at its largest, one too short for it counts one."""
        amounts = budget.amounts
        return self.text_tokens + sum(_soft(own, amounts.get(own.medium, Amount("max")), space) for own in self.extents)


def look(sample: Sample, processor: ElasticProcessor) -> Looked:
    """A sample without decoding anything.

    A stream's length is `meta.seconds` where the sample has it, else what the header of its file states. A file that
    cannot be read counts nothing: it is left out when its turn comes.

    Raises:
        ValueError: a medium the model does not take; the sample is named.
    """
    try:
        prompt = processor.chat(sample.messages)
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: {error}") from error
    targets = sum(label != IGNORED_LABEL for label in prompt.labels[1:])
    extents = tuple(_extent(part, sample, processor) for part in sample.media)
    return Looked(len(prompt.ids) - len(sample.media), targets, extents)


def media_kind(sample: Sample) -> int:
    """Samples that may cost the same at one budget only get different numbers: by their pictures, and by streams."""
    pictures = sum(part.medium == "image" for part in sample.media)
    return 2 * pictures + int(len(sample.media) > pictures)


def survey(samples: Sequence[Sample], processor: ElasticProcessor, *, kept: Path | None = None) -> Survey:
    """Look at every sample, see `look`.

    Args:
        kept: file the result is read from when it is of these samples and this processor, and written to otherwise.

    Raises:
        ValueError: a medium the model does not take; the sample is named.
    """
    key = _key(samples, processor)
    if kept is not None and (found := _read(kept, key)) is not None:
        return found
    looked = [look(sample, processor) for sample in samples]
    space = processor.space
    largest, smallest = ([one.tokens(at, space) for one in looked] for at in (space.largest(), space.smallest()))
    result = Survey(largest, [one.targets for one in looked], smallest)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(".part")
        aside.write_text(json.dumps({"key": key, **asdict(result)}), encoding="utf-8")
        aside.replace(kept)
    return result


def _extent(part: Media, sample: Sample, processor: ElasticProcessor) -> Extent:
    facts = processor.facts[part.medium]
    if facts.grid is not None:
        return Extent(part.medium, grid=facts.grid)
    assert facts.frames_per_second is not None
    frames = round(_seconds(part, sample) * facts.frames_per_second)
    return Extent(part.medium, num_frames=frames, frames_per_second=facts.frames_per_second)


def _soft(extent: Extent, amount: Amount, space: Space) -> int:
    """Soft tokens of one medium; at least one."""
    try:
        return max(space.media[extent.medium].cost(amount, extent).tokens, 1)
    except ValueError:  # too short for its budgets: found and left out when it is loaded
        return 1


def _seconds(part: Media, sample: Sample) -> float:
    stated = sample.meta.get("seconds")
    if isinstance(stated, int | float) and stated > 0:
        return float(stated)
    try:
        return header_seconds(part.medium, resolve_media(sample.root, part.path))
    except MediaError as error:
        logger.debug("no length of sample %r: %s", sample.id, error)
        return 0.0


def _key(samples: Sequence[Sample], processor: ElasticProcessor) -> str:
    """What the result depends on: the conversations and what shapes their tokens."""
    digest = hashlib.sha256(json.dumps(_plain(processor.elastic), sort_keys=True, default=str).encode())
    digest.update(str(len(processor.tokenizer)).encode())
    for sample in samples:
        digest.update(repr((sample.id, sample.messages, sorted(sample.meta.items(), key=str))).encode())
    return digest.hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _read(kept: Path, key: str) -> Survey | None:
    try:
        values = json.loads(kept.read_text(encoding="utf-8"))
        return Survey(values["tokens"], values["targets"], values["smallest"]) if values["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None
