"""Reads a list of requests, a JSON object per line, and answers them in batches; a bad line costs only itself.

    {"image": "a.png", "text": "what is it?", "budget": "image=16"}
    {"id": "second", "audio": ["b.wav"], "text": "transcribe speech to text."}

Knows lines, requests and an answerer. Does not know where answers are written.
"""

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm.budget import MEDIA, Budget
from mllm.config.nearest import nearest
from mllm.data.json_lines import numbered_lines, read_object
from mllm.data.manifest import Sample
from mllm.inference.answerer import Answerer
from mllm.inference.long_audio import Window
from mllm.inference.reading import check_media, load_request, requests_about
from mllm.inference.request import Answer, with_audio_of_videos
from mllm.processing.requests import Request, fitting_budget

KEYS = ("id", "text", *MEDIA, "budget")


@dataclass(frozen=True)
class ListedRequest:
    """Holds one line of a list: a question about files at a budget; None asks for the default of the list."""

    line_number: int
    id: str | None
    text: str | None
    files: Mapping[str, tuple[str, ...]]
    budget: Budget | None


@dataclass(frozen=True)
class RefusedRequest:
    """Says which line of a list was not answered, and why."""

    line_number: int
    id: str | None
    reason: str


@dataclass(frozen=True)
class AnsweredRequest:
    """Holds the answer to one line of a list."""

    line_number: int
    id: str | None
    answer: Answer


@dataclass(frozen=True)
class _Loaded:
    """Holds a line that can be answered: its sample, its media and the budget that holds for it."""

    line: ListedRequest
    sample: Sample
    windows: list[Window]
    budget: Budget


def read_request_list(path: str | Path) -> list[ListedRequest | RefusedRequest]:
    """Read a list of requests; paths of files are relative to its folder.

    Raises:
        OSError: the list cannot be read.
        ValueError: it has no line.
    """
    folder = os.path.dirname(os.path.abspath(path))
    lines = [_read_line(number, line, folder) for number, line in numbered_lines(path)]
    if not lines:
        raise ValueError(f"{path} holds no request; write a JSON object per line, with {', '.join(KEYS)}")
    return lines


def answer_requests(
    answerer: Answerer, requests: Sequence[ListedRequest | RefusedRequest], budget: Budget
) -> Iterator[AnsweredRequest | RefusedRequest]:
    """Answer a list in batches of the answerer's size, in its order.

    Requests of one batch that hold the same files share them, as in `Answerer.answer_samples`.

    Args:
        budget: of the requests that name none; what it says of media that a request does not hold is left out.

    Yields:
        What became of each line, in the order of the list.

    Raises:
        ValueError: the budget speaks of a medium that the model does not take.
    """
    check_media(budget, answerer.processor)
    for start in range(0, len(requests), answerer.batch_size):
        yield from _answer_batch(answerer, requests[start : start + answerer.batch_size], budget)


def _answer_batch(
    answerer: Answerer, lines: Sequence[ListedRequest | RefusedRequest], default: Budget
) -> Iterator[AnsweredRequest | RefusedRequest]:
    outcomes: dict[int, AnsweredRequest | RefusedRequest] = {}
    loaded: list[_Loaded] = []
    windows: dict[Hashable, list[Window]] = {}
    for line in lines:
        if isinstance(line, RefusedRequest):
            outcomes[line.line_number] = line
            continue
        try:
            loaded.append(_load(answerer, line, default, windows))
        except ValueError as error:
            outcomes[line.line_number] = RefusedRequest(line.line_number, line.id, " ".join(str(error).split()))
    for row, answer in zip(loaded, _answer_loaded(answerer, loaded), strict=True):
        if isinstance(answer, ValueError):
            answer = RefusedRequest(row.line.line_number, row.line.id, " ".join(str(answer).split()))
        else:
            answer = AnsweredRequest(row.line.line_number, row.line.id, answer)
        outcomes[row.line.line_number] = answer
    return iter([outcomes[line.line_number] for line in lines])


def _answer_loaded(answerer: Answerer, rows: Sequence[_Loaded]) -> list[Answer | ValueError]:
    """Answer rows together, or each alone where one of them cannot be, so that it costs no other its answer."""
    try:
        return [*answerer.answer_loaded([(row.sample, row.windows) for row in rows], [row.budget for row in rows])]
    except ValueError as error:
        if len(rows) == 1:
            return [error]
    return [answer for row in rows for answer in _answer_loaded(answerer, [row])]


def _load(answerer: Answerer, line: ListedRequest, default: Budget, windows: dict[Hashable, list[Window]]) -> _Loaded:
    """Load what a line asks about.

    Args:
        windows: of the requests before it, by their files; what this one reads is added.

    Raises:
        MediaError, ValueError: as `Answerer.answer`.
    """
    processor = answerer.processor
    files = with_audio_of_videos(line.files, default if line.budget is None else line.budget)
    request = requests_about(files, [line.text], processor)[0]
    sample = replace(request.sample, id=f"line {line.line_number}")
    budget = _budget_of(line, default, sample)
    key = (sample.media_key, budget if processor.loads_by_budget else None)
    if key not in windows:
        named = Request(sample, request.names, request.in_memory)
        budgets = answerer.chooser.candidates(budget, [part.medium for part in sample.media])
        windows[key] = load_request(named, budgets, processor, loader=answerer.loader, long_audio=answerer.long_audio)
    return _Loaded(line, sample, windows[key], budget)


def _budget_of(line: ListedRequest, default: Budget, sample: Sample) -> Budget:
    if line.budget is not None:
        return fitting_budget(line.budget, [sample])
    return default.only({part.medium for part in sample.media})


def _read_line(line_number: int, line: bytes, folder: str) -> ListedRequest | RefusedRequest:
    request_id = None
    try:
        values = read_object(line)
        if not isinstance(values, dict):
            raise ValueError(f"a request is an object with {', '.join(KEYS)}, got {type(values).__name__}")
        if isinstance(written := values.get("id"), str | int):
            request_id = str(written)
        for key in values:
            if key not in KEYS:
                raise ValueError(f"unknown key {key}; {nearest(key, KEYS)}")
        text, budget = _text(values, "text"), _text(values, "budget")
        files = {medium: _paths(values, medium, folder) for medium in MEDIA if medium in values}
        if text is None and not any(files.values()):
            raise ValueError("nothing to answer: give text, image, audio or video")
        return ListedRequest(line_number, request_id, text, files, None if budget is None else Budget.parse(budget))
    except ValueError as error:
        return RefusedRequest(line_number, request_id, " ".join(str(error).split()))


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a text, got {value!r}")
    return value


def _paths(values: Mapping[str, Any], medium: str, folder: str) -> tuple[str, ...]:
    value = values[medium]
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{medium} must be the path of a file or a list of paths, got {value!r}")
    return tuple(os.path.join(folder, path) for path in paths)
