"""Says which samples hold the same files, so that a batch can hold them together and read every file once.

Knows samples, and how many tokens each costs. Does not know batches, augmentation or how media are loaded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm.data.manifest import Media, Message, Sample, Text


def samples_that_share(samples: Sequence[Sample]) -> list[list[int]]:
    """Put every sample in one group, with all that share a file with it or with another of the group.

    Returns:
        Groups in the order of their first samples, each in order.
    """
    first = list(range(len(samples)))  # of the group of each sample; a chain leads there

    def first_of(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    # Union-find: the first sample that holds a file stands for all that do, and groups that share one become one.
    holder: dict[tuple[str, str], int] = {}
    for index, sample in enumerate(samples):
        for part in sample.media:
            other, this = first_of(holder.setdefault((str(sample.root), part.path), index)), first_of(index)
            first[max(other, this)] = min(other, this)
    groups: dict[int, list[int]] = {}
    for index in range(len(samples)):
        groups.setdefault(first_of(index), []).append(index)
    return list(groups.values())


def parts_that_fit(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], *, max_tokens: int, max_rows: int | None
) -> list[list[int]]:
    """Return the same groups, those that no batch could hold cut into parts that one can, in order.

    Args:
        lengths: tokens of each sample; none is longer than `max_tokens`.
        max_tokens: most tokens of a batch, rows x longest.
        max_rows: most samples of a batch.
    """
    parts: list[list[int]] = []
    for group in groups:
        longest = 0
        parts.append([])
        for index in group:
            longest = max(longest, lengths[index])
            rows = len(parts[-1]) + 1
            if parts[-1] and (rows * longest > max_tokens or rows > (max_rows or rows)):
                parts.append([])
                longest = lengths[index]
            parts[-1].append(index)
    return parts


def with_media(sample: Sample, media: Collection[str]) -> Sample:
    """Return a sample without its items of other media; the sample itself where it has none."""
    if all(part.medium in media for part in sample.media):
        return sample
    messages = tuple(
        replace(message, parts=tuple(part for part in message.parts if isinstance(part, Text) or part.medium in media))
        for message in sample.messages
    )
    return replace(sample, messages=messages)


def merge_media(samples: Sequence[Sample], name: str) -> list[Sample]:
    """Return what to load so that every file of samples that share some is loaded once: one sample that holds all
    media.

    Where images are among them, one for every list of media instead: how many tiles an image is cut into may depend
    on what stands beside it, so only samples with the very same media share them.

    Args:
        name: the id of the new samples.
    """
    if any(part.medium == "image" for sample in samples for part in sample.media):
        return [replace(sample, id=name) for sample in {one.media: one for one in samples}.values()]
    return [_all_media(samples, name)]


def split_media(loaded: Mapping[tuple[Media, ...], Sequence[Any]], samples: Sequence[Sample]) -> list[list[Any]]:
    """Return what was loaded of merged samples, by their media, as the media of each sample; the same objects."""
    known = {media: dict(zip(media, values, strict=True)) for media, values in loaded.items()}
    (whole, *_) = known.values()
    return [[known.get(sample.media, whole)[part] for part in sample.media] for sample in samples]


def _all_media(samples: Sequence[Sample], name: str) -> Sample:
    """Return one sample with all media of samples, each once: first those of the sample that has most.

    What belongs to one message stays in one, since audio and video of a message may be one clip.
    """
    most = max(samples, key=lambda sample: len(sample.media))
    seen: set[Media] = set()
    messages = []
    for sample in [most, *(sample for sample in samples if sample is not most)]:
        for message in sample.messages:
            new = dict.fromkeys(part for part in message.parts if isinstance(part, Media) and part not in seen)
            seen |= new.keys()
            messages += [Message("user", tuple(new))] if new else []
    return replace(most, id=name, messages=tuple(messages))
