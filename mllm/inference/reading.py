"""Reads questions about files: their samples, their media, which are loaded once for all of them, and the budget.

Knows a processor, requests and windows. Does not know models or how tokens are chosen.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mllm.budget import Budget, BudgetInput
from mllm.config.long_audio import LongAudio
from mllm.data.manifest import Sample
from mllm.inference.long_audio import Window, load_windows
from mllm.inference.request import DEFAULT_PROMPTS, Files, request, with_audio_of_videos
from mllm.media import MediaError, MediaLoader
from mllm.processing.processor import ElasticProcessor
from mllm.processing.requests import Request, fitting_budget
from mllm.router.choice import BudgetChooser


class Questions(NamedTuple):
    """Questions about the same files: one sample each, the windows their media come in, and the budget of all."""

    samples: list[Sample]
    windows: list[Window]
    budget: Budget


def requests_about(
    files: Mapping[str, Files], texts: Sequence[str | None], processor: ElasticProcessor
) -> list[Request]:
    """Reads several questions about the same media; see `mllm.inference.request.request`."""
    prompts = {**DEFAULT_PROMPTS, **processor.prompts}
    return [request(files, text, prompts, separator=processor.separator) for text in texts]


def samples_about(files: Mapping[str, Files], texts: Sequence[str | None], processor: ElasticProcessor) -> list[Sample]:
    """Makes a sample of each of several questions about the same media."""
    return [each.sample for each in requests_about(files, texts, processor)]


def read_request(
    files: Mapping[str, Files],
    texts: Sequence[str | None],
    budget: BudgetInput,
    processor: ElasticProcessor,
    *,
    loader: MediaLoader | None = None,
    long_audio: LongAudio | None = None,
    chooser: BudgetChooser | None = None,
) -> Questions:
    """Reads several questions about the same files and loads their media once.

    Args:
        files: by medium.
        texts: one per question; None asks the default question about these media.
        loader: limits and decoders other than the default ones.
        long_audio: how to read audio longer than its encoder's window; refused when None.
        chooser: tells which budgets an open one may become.

    Raises:
        MediaError: a file that is missing or cannot be read, by the name the user gave it.
        ValueError: a medium the model does not take, a budget that cannot be met (with what is allowed), or nothing
            to ask.
    """
    budget = Budget.of(budget)
    requests = requests_about(with_audio_of_videos(files, budget), texts, processor)
    samples = [request.sample for request in requests]
    fitting_budget(budget, samples)
    media = [part.medium for part in samples[0].media]
    budgets = [budget] if chooser is None else chooser.candidates(budget, media)
    windows = load_request(requests[0], budgets, processor, loader=loader, long_audio=long_audio)
    return Questions(samples, windows, budget)


def load_request(
    request: Request,
    budgets: Sequence[Budget],
    processor: ElasticProcessor,
    *,
    loader: MediaLoader | None = None,
    long_audio: LongAudio | None = None,
) -> list[Window]:
    """Loads the media of a request as windows, one of which is all where nothing is cut.

    Args:
        budgets: that it is going to be asked at, which say how images are cut into tiles.

    Raises:
        MediaError: a file that is missing or cannot be read, by the name the user gave it.
        ValueError: a medium the model does not take, or that its encoder cannot.
    """
    sample, names, in_memory = request
    try:
        return load_windows(
            sample, processor, long_audio or LongAudio(), loader=loader, budgets=budgets, in_memory=in_memory
        )
    except MediaError as error:
        name = names.get(error.path, error.path)
        raise MediaError(error.kind, name, error.reason) from error  # pyright: ignore[reportArgumentType]


def check_media(budget: Budget, processor: ElasticProcessor) -> None:
    """Refuses a budget for several requests that speaks of a medium the model does not take.

    Raises:
        ValueError: it does; the media that the model takes are named.
    """
    if unknown := budget.media - set(processor.placeholder_ids):
        allowed = ", ".join(processor.placeholder_ids) or "text only"
        raise ValueError(
            f"the budget {str(budget)!r} names {min(unknown)}, which this model does not take; it takes {allowed}"
        )
