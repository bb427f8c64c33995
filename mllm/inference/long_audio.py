"""Loads a sample whose audio is longer than its encoder's window as windows, and joins the answers about them.

Knows samples, loaded media and answers. Does not know how answers come about; where windows lie and
how words meet is in `inference/windows.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mllm.budget import MEDIA, Budget
from mllm.config.long_audio import LongAudio
from mllm.data.av_pairs import clip_pairs
from mllm.data.manifest import Sample
from mllm.inference.request import Answer
from mllm.inference.timing import PHASES, Timing
from mllm.inference.windows import join_transcripts, window_times
from mllm.media import Audio, InMemoryMedium, Reader, Video
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.processor import ElasticProcessor


@dataclass(frozen=True)
class Window:
    """A stretch of a sample, from `start` to `stop` seconds, with its media as their encoders want them."""

    start: float
    stop: float
    media: list[LoadedMedia]


def load_windows(
    sample: Sample,
    processor: ElasticProcessor,
    long_audio: LongAudio,
    *,
    loader: Reader | None = None,
    noise: Callable[[Audio], Audio] | None = None,
    budgets: Sequence[Budget] = (),
    in_memory: Sequence[InMemoryMedium | None] = (),
) -> list[Window]:
    """Loads a sample; in windows where its one audio, alone or with the video of the same clip, is too long.

    Noise is mixed into the whole audio before it is cut, so that its ratio is that of the whole.

    Args:
        long_audio: how to read audio that is too long.
        loader, noise, budgets, in_memory: as in `ElasticProcessor.load_media`.

    Raises:
        MediaError, ValueError: as `ElasticProcessor.load_media`, and lengths that do not go with the encoder.
    """
    if long_audio.mode == "refuse" or not _can_be_cut(sample, processor):
        whole = processor.load_media(sample, loader=loader, noise=noise, budgets=budgets, in_memory=in_memory)
        return [Window(0.0, 0.0, whole)]
    window, overlap = lengths_of(long_audio, processor)
    raws = processor.read_media(sample, loader, in_memory=in_memory)
    try:
        raws = [noise(raw) if noise is not None and isinstance(raw, Audio) else raw for raw in raws]
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: {error}") from error
    seconds = next(raw.seconds for raw in raws if isinstance(raw, Audio))
    return [
        Window(
            *span,
            processor.prepare_media(sample, [_cut(raw, *span) for raw in raws], budgets=budgets, in_memory=in_memory),
        )
        for span in window_times(seconds, window, overlap)
    ]


def lengths_of(long_audio: LongAudio, processor: ElasticProcessor) -> tuple[float, float]:
    """Tells the seconds of a window and of an overlap of a model's audio.

    Raises:
        ValueError: a model that takes no audio, or as `LongAudio.lengths`.
    """
    if "audio" not in processor.placeholder_ids:
        allowed = ", ".join(processor.placeholder_ids) or "text only"
        raise ValueError(f"long_audio is {long_audio.mode}, but this model does not take audio; it takes {allowed}")
    return long_audio.lengths(processor.window_seconds)


def _cut(raw: Audio | Video, start: float, stop: float) -> Audio | Video:
    """Cuts the stretch of an audio or a video from one second to another."""
    if isinstance(raw, Audio):
        first, last = (round(second * raw.sample_rate_hz) for second in (start, stop))
        return Audio(raw.samples[first:last], raw.sample_rate_hz)
    first, last = (round(second * raw.frames_per_second) for second in (start, stop))
    return Video(raw.frames[first:last], raw.frames_per_second)


def _can_be_cut(sample: Sample, processor: ElasticProcessor) -> bool:
    """Tells whether there is one audio, and nothing beside it but the video of the same clip."""
    media = [part.medium for part in sample.media]
    is_clip = sorted(media) == ["audio", "video"] and bool(clip_pairs(sample)) and "video" not in processor.sampling
    return media == ["audio"] or is_clip


def join_answers(windows: Sequence[Window], answers: Sequence[Answer]) -> Answer:
    """Joins the answers about each window; tokens, milliseconds and probabilities are those of all together."""
    overlaps = [before.stop - after.start for before, after in pairwise(windows)]
    tokens = {medium: sum(answer.tokens.get(medium, 0) for answer in answers) for medium in MEDIA}
    timings = [answer.timing for answer in answers if answer.timing is not None]
    num_new_tokens = sum(answer.num_new_tokens for answer in answers)
    log_probability = sum(answer.mean_log_probability * answer.num_new_tokens for answer in answers)
    return replace(
        answers[0],
        text=join_transcripts([answer.text for answer in answers], max(overlaps, default=0.0)),
        tokens={medium: count for medium, count in tokens.items() if medium in answers[0].tokens},
        is_trained=all(answer.is_trained for answer in answers),
        is_cut=any(answer.is_cut for answer in answers),
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_new_tokens=num_new_tokens,
        num_shared_tokens=sum(answer.num_shared_tokens for answer in answers),
        timing=Timing(*(sum(getattr(one, phase) for one in timings) for phase in PHASES)) if timings else None,
        discarded=(),
        min_probability=min(answer.min_probability for answer in answers),
        mean_log_probability=log_probability / num_new_tokens,
    )
