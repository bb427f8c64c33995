"""Says which audio and which video of a sample are one clip, so that they must be equally long.

Knows samples. Does not open files.
"""

from pathlib import PurePosixPath

from mllm.data.manifest import Media, Sample


def clip_pairs(sample: Sample) -> list[tuple[int, int]]:
    """Return the positions, in `sample.media`, of the audio and the video of each clip.

    Two media of one message are one clip when their files have the same name but for folder and suffix, or are the same
    file. `meta.one_clip` overrules names: true makes one clip of a message's only audio and only video, false of none.

    Raises:
        ValueError: `meta.one_clip` is neither true nor false.
    """
    stated = sample.meta.get("one_clip")
    if stated not in (True, False, None):
        raise ValueError(f"sample {sample.id!r}: meta.one_clip must be true or false, got {stated!r}")
    pairs, first = [], 0
    for message in sample.messages:
        media = [part for part in message.parts if isinstance(part, Media)]
        audios = [(number, part) for number, part in enumerate(media, first) if part.medium == "audio"]
        videos = [(number, part) for number, part in enumerate(media, first) if part.medium == "video"]
        first += len(media)
        if stated is None:
            pairs += [(i, j) for i, audio in audios for j, video in videos if _name(audio) == _name(video)]
        elif stated and len(audios) == len(videos) == 1:
            pairs.append((audios[0][0], videos[0][0]))
    return pairs


def _name(part: Media) -> str:
    return PurePosixPath(part.path).stem
