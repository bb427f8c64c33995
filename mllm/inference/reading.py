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
    samples, (_, names, media_at_hand) = [request.sample for request in requests], requests[0]
    fitting_budget(budget, samples)
    media = [part.medium for part in samples[0].media]
    budgets = [budget] if chooser is None else chooser.candidates(budget, media)
    try:
        windows = load_windows(
            samples[0], processor, long_audio or LongAudio(), loader=loader, budgets=budgets, in_memory=media_at_hand
        )
    except MediaError as error:
        name = names.get(error.path, error.path)
        raise MediaError(error.kind, name, error.reason) from error  # pyright: ignore[reportArgumentType]
    return Questions(samples, windows, budget)
