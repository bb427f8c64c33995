"""Turns one request about files into a sample, and defines what an answer to it tells.

Knows files, samples, budgets and timings. Does not know how an answer comes about.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mllm.budget import MEDIA, Budget, Extent, Space, TokenCount
from mllm.inference.timing import Timing
from mllm.media import MediaInput, is_file, items_of
from mllm.processing.requests import Request, read_request

# The question where the user gives none, by media; those of speech are the published systems' and the synthetic
# corpus'.
DEFAULT_PROMPTS: dict[tuple[str, ...], str] = {
    ("image",): "describe the picture.",
    ("audio",): "transcribe speech to text.",
    ("video",): "transcribe video to text.",
    ("audio", "video"): "transcribe speech and video to text.",
}
Files = MediaInput | Sequence[MediaInput]
"""One or several of what `mllm.media.in_memory` reads: paths, bytes, PIL images, arrays."""


@dataclass(frozen=True)
class Answer:
    """Holds what the model said to one request, and what it used for it.

    `tokens` are the soft tokens used, by medium; `is_trained` is false where a medium's budget was not in the trained
    space. `num_prompt_tokens` is the whole prompt, of which the first `num_shared_tokens` were read once together with
    other questions about the same media, and `num_new_tokens` counts the end token. `timing` is that of the whole
    batch, where it was measured. `is_cut` is true where the model had not ended when `max_new_tokens` were there.
    `min_probability` is the smallest probability of any token of the answer, its end included, and
    `mean_log_probability` the mean of the logarithms; with beams they are those of the best one.

    Where a router chose the budget, `discarded` are the answers at smaller ones, in order; `tokens` and `timing` count
    what was read for them as well, everything else is of this answer alone. Of its prompt, the first `num_kept_tokens`
    had been read for the answer before it.
    """

    text: str
    budget: Budget
    tokens: Mapping[str, int]
    is_trained: bool
    num_prompt_tokens: int
    num_new_tokens: int
    timing: Timing | None = None
    num_shared_tokens: int = 0
    is_cut: bool = False
    # Rounding depends on the batch, and two answers that say and cost the same are the same.
    min_probability: float = field(default=1.0, compare=False)
    mean_log_probability: float = field(default=0.0, compare=False)
    discarded: tuple["Answer", ...] = ()
    num_kept_tokens: int = 0


def request(
    media: Mapping[str, Files],
    text: str | None = None,
    prompts: Mapping[tuple[str, ...], str] = DEFAULT_PROMPTS,
    *,
    separator: str = "",
) -> Request:
    """Read one request about media: files anywhere on the disk, or what is at hand (`mllm.media.in_memory`).

    Args:
        separator: put between the media and the question where it does not begin with it already.

    Raises:
        ValueError: neither media nor text, or no default prompt for these media.
    """
    if text is None:
        text = default_question({medium for medium in MEDIA if items_of(medium, media.get(medium))}, prompts)
    return read_request(media, text, separator=separator)


def default_question(media: Collection[str], prompts: Mapping[tuple[str, ...], str] = DEFAULT_PROMPTS) -> str:
    """Tells what is asked about media where the user asks nothing.

    Raises:
        ValueError: no media, or none of the prompts is about these.
    """
    present = tuple(medium for medium in MEDIA if medium in media)
    if not present:
        raise ValueError("nothing to answer: give text, or an image, audio or video file")
    if present not in prompts:
        raise ValueError(f"there is no default question about {' and '.join(present)} together; give text")
    return prompts[present]


def with_audio_of_videos(media: Mapping[str, Files], budget: Budget) -> dict[str, Files]:
    """Adds the audio of the videos where a budget names audio and the request holds none."""
    if "audio" not in budget.amounts or items_of("audio", media.get("audio")):
        return dict(media)
    files = [file for file in items_of("video", media.get("video")) if is_file(file)]
    return {**media, "audio": files}


def tokens_by_medium(extents: Sequence[Extent], counts: Sequence[TokenCount]) -> dict[str, int]:
    """Sums the soft tokens of a request by medium, in the order of `MEDIA`."""
    sums: dict[str, int] = {}
    for medium in MEDIA:
        tokens = [count.tokens for extent, count in zip(extents, counts, strict=True) if extent.medium == medium]
        if tokens:
            sums[medium] = sum(tokens)
    return sums


def is_trained(extents: Sequence[Extent], counts: Sequence[TokenCount], space: Space) -> bool:
    """Tells whether training sampled the count of every medium of a request, however the budget put it."""
    return all(
        space.media[extent.medium].is_trained_count(count) for extent, count in zip(extents, counts, strict=True)
    )
