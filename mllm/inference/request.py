"""One request about files as a sample, and what an answer to it says.

Knows files, samples and budgets. Does not know models or how tokens are chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm.budget import MEDIA, Budget, Cost, Extent, Space
from mllm.inference.timing import Timing
from mllm.media import MediaInput, is_file, several
from mllm.processing.requests import Request, read_request

# What is asked when nothing is, by media; those of speech are the published systems' (and the synthetic corpus's).
DEFAULT_PROMPTS: dict[tuple[str, ...], str] = {
    ("image",): "describe the picture.",
    ("audio",): "transcribe speech to text.",
    ("video",): "transcribe video to text.",
    ("audio", "video"): "transcribe speech and video to text.",
}
Files = MediaInput | Sequence[MediaInput]
"""One or several of what `mllm.media.given` reads: paths, bytes, PIL images, arrays."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it was given.

    `tokens` are the soft tokens used, by medium; `is_trained` is false where a medium's budget was not in the trained
    space. `num_prompt_tokens` is the whole prompt, of which the first `num_shared_tokens` were read once together with
    other questions about the same media, and `num_new_tokens` counts the end token. `timing` is that of the whole
    batch, where it was asked for. `is_cut` is true where the model had not ended when `max_new_tokens` were there.
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


def request(
    media: Mapping[str, Files],
    text: str | None = None,
    prompts: Mapping[tuple[str, ...], str] = DEFAULT_PROMPTS,
    *,
    separator: str = "",
) -> Request:
    """Read one request about media: files anywhere on the disk, or what is at hand (`mllm.media.given`).

    Args:
        separator: put between the media and the question where it does not begin with it already.

    Raises:
        ValueError: neither media nor text, or no default prompt for these media.
    """
    present = tuple(medium for medium in MEDIA if several(medium, media.get(medium)))
    if text is None and not present:
        raise ValueError("nothing to answer: give text, or an image, audio or video file")
    if text is None and present not in prompts:
        raise ValueError(f"there is no default question about {' and '.join(present)} together; give text")
    return read_request(media, prompts[present] if text is None else text, separator=separator)


def with_sound(media: Mapping[str, Files], budget: Budget) -> dict[str, Files]:
    """Add the sound of the videos where a budget speaks of audio and none was given."""
    if "audio" not in budget.amounts or several("audio", media.get("audio")):
        return dict(media)
    files = [file for file in several("video", media.get("video")) if is_file(file)]
    return {**media, "audio": files}


def tokens_by_medium(extents: Sequence[Extent], costs: Sequence[Cost]) -> dict[str, int]:
    """Soft tokens of a request by medium, in the order of `MEDIA`."""
    sums: dict[str, int] = {}
    for medium in MEDIA:
        own = [cost.tokens for extent, cost in zip(extents, costs, strict=True) if extent.medium == medium]
        if own:
            sums[medium] = sum(own)
    return sums


def is_trained(extents: Sequence[Extent], costs: Sequence[Cost], space: Space) -> bool:
    """Whether training drew what every medium of a request costs, however the budget put it."""
    return all(space.media[extent.medium].is_trained_cost(cost) for extent, cost in zip(extents, costs, strict=True))
