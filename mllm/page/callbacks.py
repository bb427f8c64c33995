"""Answers what a page asks: at one budget, at all side by side, and what each soft token covers.

Knows the fields of a page as values, and a client of the server. Does not know components.
"""

import asyncio
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.page.client import Answered, Client, PageMedium
from mllm.page.covers import Covered, Covers
from mllm.page.drawing import data_url, draw_overlay, plot_budgets
from mllm.page.stops import Stop, combinations, written_flops
from mllm.page.uploads import Uploads
from mllm.serving.errors import RequestError, bad_request


@dataclass(frozen=True)
class SideBySide:
    """Answers at several budgets: a table in HTML, and a figure of matplotlib."""

    table: str
    figure: Any


@dataclass(frozen=True)
class ShownOverlay:
    """An image with what its soft tokens cover in HTML, and how many there are."""

    html: str
    num_tokens: int


@dataclass(frozen=True)
class Fields:
    """What is filled in: the question, per medium a file as Gradio names it, and where its slider stands.

    Args:
        with_audio: the audio of a video is read too.
    """

    question: str | None
    files: Mapping[str, Any]
    positions: Mapping[str, Any]
    with_audio: bool = False


class Callbacks:
    """Answers for one page.

    Args:
        stops: of each medium's slider; its media are those of the model.
        prompts: the usual questions, by media.
        covers: None where it cannot be told what soft tokens cover.
        most_at_once: requests of one press of a button that are under way together.
        most_bytes_at_once: of their bodies.
    """

    def __init__(
        self,
        client: Client,
        uploads: Uploads,
        stops: Mapping[str, Sequence[Stop]],
        prompts: Mapping[tuple[str, ...], str],
        *,
        covers: Covers | None,
        most_at_once: int,
        most_bytes_at_once: int,
    ) -> None:
        self.client = client
        self.uploads = uploads
        self.stops = stops
        self.prompts = prompts
        self.covers = covers
        self.most_at_once = most_at_once
        self.most_bytes_at_once = most_bytes_at_once

    async def answer(self, fields: Fields) -> Answered:
        """Answer at the budgets of the sliders.

        Raises:
            RequestError: what is wrong with the request, as the server says it.
        """
        files = await self._files(fields)
        chosen = [self._stop(medium, fields.positions[medium]) for medium in files]
        return await self.client.answer(self._body(fields, files, chosen))

    async def side_by_side(self, fields: Fields) -> SideBySide:
        """Answer at all trained budgets; the media are encoded once, and all answers written together.

        Raises:
            RequestError: as `answer`.
        """
        files = await self._files(fields)
        if not files:
            raise bad_request("there is no image, audio or video whose budget could differ; add one")
        budgets, number = combinations([self.stops[medium] for medium in files])
        size = self._number_at_once(sum(map(len, files.values())))
        answers: list[Answered] = []
        for start in range(0, len(budgets), size):
            bodies = [self._body(fields, files, chosen) for chosen in budgets[start : start + size]]
            async with asyncio.TaskGroup() as tasks:
                waiting = [tasks.create_task(self._answered(body)) for body in bodies]
            done = [task.result() for task in waiting]
            answers += [_answer_of(outcome) for outcome in done]
        names = [",".join(stop.budget for stop in chosen) for chosen in budgets]
        tokens = [sum(answer.tokens.values()) for answer in answers]
        figure = await asyncio.to_thread(plot_budgets, names, tokens, [answer.text for answer in answers])
        return SideBySide(table_of(budgets, answers, number), figure)

    async def overlay(self, fields: Fields, position: int) -> ShownOverlay:
        """Show what the soft tokens of the image cover at the budget of its slider.

        Args:
            position: number of the soft token that is coloured, from 1; 0 colours none.

        Raises:
            RequestError: as `answer`, or there is no image.
        """
        content = await asyncio.to_thread(self.uploads.read, fields.files.get("image"), "image")
        if content is None or self.covers is None:
            raise bad_request("there is no image; add one", "image")
        stop = self._stop("image", fields.positions["image"])
        covered = await self.covers.of(self.client.body("", [PageMedium("image", content, stop.budget)]))
        number = covered.overlay.num_tokens
        if (token := _whole(position, "soft token")) > number:
            raise bad_request(f"there is no soft token {token}; allowed: 1 to {number}", "soft token")
        return ShownOverlay(await asyncio.to_thread(_figure_of, covered, token, stop.budget), number)

    async def _files(self, fields: Fields) -> dict[str, bytes]:
        """Read the files, by medium in the order of prompts; the audio of a video is the video's own bytes."""
        files = {}
        for medium in self.stops:
            content = await asyncio.to_thread(self.uploads.read, fields.files.get(medium), medium)
            if content is None and medium == "audio" and fields.with_audio:
                content = await asyncio.to_thread(self.uploads.read, fields.files.get("video"), "video")
            if content is not None:
                files[medium] = content
        return files

    def _stop(self, medium: str, position: Any) -> Stop:
        stops = self.stops[medium]
        number = _whole(position, f"{medium} slider")
        if number >= len(stops):
            raise bad_request(f"the {medium} slider has {len(stops)} stops, got {number + 1}", medium)
        return stops[number]

    def _body(self, fields: Fields, files: Mapping[str, bytes], chosen: Sequence[Stop]) -> dict[str, Any]:
        media = [
            PageMedium(medium, content, stop.budget)
            for (medium, content), stop in zip(files.items(), chosen, strict=True)
        ]
        return self.client.body(self._question(fields.question, tuple(files)), media)

    def _question(self, text: str | None, media: tuple[str, ...]) -> str:
        """The question, or the usual one about these media where none is typed."""
        if text is not None and text.strip():
            return text
        if not media:
            raise bad_request("there is no question and no image, audio or video; add one", "question")
        if media not in self.prompts:
            raise bad_request(f"there is no usual question about {' and '.join(media)}; type one", "question")
        return self.prompts[media]

    def _number_at_once(self, num_bytes: int) -> int:
        """How many requests with so many bytes of files may be under way together; base64 is a third longer."""
        by_bytes = int(self.most_bytes_at_once / max(4 / 3 * num_bytes, 1))
        return max(min(self.most_at_once, by_bytes), 1)

    async def _answered(self, body: Mapping[str, Any]) -> Answered | RequestError:
        try:
            return await self.client.answer(body)
        except RequestError as error:  # the others' answers are awaited all the same, and the first refusal is told
            return error


def _answer_of(outcome: Answered | RequestError) -> Answered:
    if isinstance(outcome, RequestError):
        raise outcome
    return outcome


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 0:
        raise bad_request(f"the {name} must be a whole number from 0", name)
    return int(value)


def _figure_of(covered: Covered, position: int, budget: str) -> str:
    """The image with its overlay, and a line that says what is shown."""
    overlay = covered.overlay
    weights = overlay.of_token(position - 1) if position else None
    drawn = draw_overlay(covered.pixels, overlay.owners(), weights)
    if not position:
        said = f"{budget}: the areas of all soft tokens, {overlay.num_tokens} in number"
    elif weights is None:
        said = f"{budget}: soft token {position} of {overlay.num_tokens} ends a row and covers nothing of the image"
    else:
        patches = f"{int((weights > 0).sum())} of {weights.numel()} patches"
        said = f"{budget}: soft token {position} of {overlay.num_tokens} is made of {patches}"
    words = html.escape(said)
    return (
        f'<figure class="overlay"><img src="{data_url(drawn)}" alt="{words}"><figcaption>{words}</figcaption></figure>'
    )


def table_of(budgets: Sequence[Sequence[Stop]], answers: Sequence[Answered], number: int) -> str:
    """Write budgets, what they cost and what was answered as a table in HTML.

    Args:
        number: of all budgets there are.
    """
    rows = []
    for chosen, answered in zip(budgets, answers, strict=True):
        # Costs are those of requests about one medium.
        alone = chosen[0] if len(chosen) == 1 else None
        time = None if alone is None else alone.milliseconds
        cells = [
            ",".join(stop.budget for stop in chosen),
            str(sum(answered.tokens.values())),
            "" if alone is None else written_flops(alone.flops),
            "" if time is None else f"{time:.1f}",
            answered.text + (" …" if answered.is_cut else ""),
        ]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    titles = ("budget", "soft tokens", "FLOPs", "ms measured", "answer")
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    left_out = f"<p>{len(budgets)} of {number} budgets, evenly spaced</p>" if len(budgets) < number else ""
    return f'<table class="budgets"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{left_out}'
