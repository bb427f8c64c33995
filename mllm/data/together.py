"""Which samples hold the same files, so that a batch can hold them together and read every file once.

Knows samples, and how many tokens each costs. Does not know batches, chance or how media are loaded.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mllm.data.manifest import Media, Message, Sample


def sharers(samples: Sequence[Sample]) -> list[list[int]]:
    """Every sample in one group, with all that share a file with it or with another of the group.

    Returns:
        Groups in the order of their first samples, each in order.
    """
    first = list(range(len(samples)))  # of the group of each sample; a chain leads there

    def find(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    holder: dict[tuple[str, str], int] = {}
    for index, sample in enumerate(samples):
        for part in sample.media:
            other, own = find(holder.setdefault((str(sample.root), part.path), index)), find(index)
            first[max(other, own)] = min(other, own)
    groups: dict[int, list[int]] = {}
    for index in range(len(samples)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def fitting(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], *, max_tokens: int, max_rows: int | None
) -> list[list[int]]:
    """The same groups, those that no batch could hold cut into parts that one can, in order.

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


def whole(samples: Sequence[Sample], name: str) -> Sample:
    """All media of samples as those of one sample, each once: first those of the sample that has most.

    What belongs to one message stays in one, since sounds and videos of a message may be one clip.

    Args:
        name: the id of the new sample.
    """
    most = max(samples, key=lambda sample: len(sample.media))
    seen: set[Media] = set()
    messages = []
    for sample in [most, *(own for own in samples if own is not most)]:
        for message in sample.messages:
            new = dict.fromkeys(part for part in message.parts if isinstance(part, Media) and part not in seen)
            seen |= new.keys()
            messages += [Message("user", tuple(new))] if new else []
    return replace(most, id=name, messages=tuple(messages))


def parted(loaded: Sequence[Any], own: Sample, samples: Sequence[Sample]) -> list[list[Any]]:
    """What was loaded of the media of `whole` samples, as the media of each sample; the same objects."""
    known = dict(zip(own.media, loaded, strict=True))
    return [[known[part] for part in sample.media] for sample in samples]
