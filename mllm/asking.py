"""One request about files as a sample, and what an answer to it says.

Knows files, samples and budgets. Does not know models or how tokens are chosen.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.budget import MEDIA, Budget, Cost, Extent, Space
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.timing import Timing

# What is asked when nothing is, by media; those of speech are the published systems' (and the built-in world's).
DEFAULT_PROMPTS: dict[tuple[str, ...], str] = {
    ("image",): "describe the picture.",
    ("audio",): "transcribe speech to text.",
    ("video",): "transcribe video to text.",
    ("audio", "video"): "transcribe speech and video to text.",
}
SEPARATORS = {"vicuna_v1": "\n"}
"""By chat format, what published data put between pictures and a question; a manifest's texts hold it themselves."""
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


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
    files: Mapping[str, Files],
    text: str | None = None,
    prompts: Mapping[tuple[str, ...], str] = DEFAULT_PROMPTS,
    *,
    separator: str = "",
) -> tuple[Sample, dict[str, str]]:
    """One request about files anywhere on the disk, as a sample.

    Args:
        separator: put between the files and the question where it does not begin with it already.

    Returns:
        The sample, and the name the caller gave each file by its path in the sample, for messages.

    Raises:
        ValueError: neither files nor text, or no default prompt for these media.
    """
    named = [(medium, os.fspath(file)) for medium in MEDIA for file in _several(files.get(medium, ()))]
    media = tuple(dict.fromkeys(medium for medium, _ in named))
    if text is None and not named:
        raise ValueError("nothing to answer: give text, or an image, audio or video file")
    if text is None and media not in prompts:
        raise ValueError(f"there is no default question about {' and '.join(media)} together; give text")
    # Links are followed here: whoever names a file may read it, while a manifest cannot leave its root.
    real = [os.path.realpath(file) for _, file in named]
    root = os.path.commonpath([os.path.dirname(path) for path in real]) if real else os.curdir
    paths = [Path(path).relative_to(root).as_posix() for path in real]
    parts = tuple(Media(medium, path) for (medium, _), path in zip(named, paths, strict=True))  # type: ignore[arg-type]
    question = prompts[media] if text is None else text
    if named and not question.startswith(separator):
        question = f"{separator}{question}"
    message = Message("user", (*parts, Text(question)))
    names = {path: name for path, (_, name) in zip([*paths, *real], [*named, *named], strict=True)}
    return Sample("request", (message,), task="generate", root=Path(root)), names


def _several(files: Files) -> list[str | os.PathLike[str]]:
    return [files] if isinstance(files, str | os.PathLike) else list(files)


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
