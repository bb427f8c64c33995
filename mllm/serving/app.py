"""Lays out the routes of the server: OpenAI's, and those that tell budgets, health and metrics.

Knows HTTP and the forms of requests and answers. Does not know models.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mllm.serving.answers import DONE, ChatAnswer, event, transcript_of, transcript_usage
from mllm.serving.chat_request import ChatReader, ChatRequest
from mllm.serving.errors import RequestError, bad_request
from mllm.serving.json_body import read_json
from mllm.serving.service import Job, Service
from mllm.serving.transcription_request import TranscriptionReader, TranscriptionRequest

LOGGER = logging.getLogger(__name__)
LEFT = Response(status_code=499)
"""Goes to a client that has left, so to nobody."""
MAX_FORM_FIELDS = 32
Result = TypeVar("Result")


class ClientLeft(Exception):
    """Says that the client has closed its connection."""


@dataclass(frozen=True)
class Served:
    """Holds what a server tells of itself and reads requests with.

    Args:
        name: of the model, in requests and answers.
        budgets: see `mllm.serving.budget_table`.
        settings: of budgets: the default, and the cap.
    """

    name: str
    chat: ChatReader
    transcription: TranscriptionReader
    budgets: Sequence[Mapping[str, Any]]
    settings: Mapping[str, str | None]


def build_app(
    service: Service, served: Served, lifespan: Callable[[Any], AbstractAsyncContextManager[None]]
) -> FastAPI:
    """Make the application.

    Args:
        lifespan: what is done before the first request and after the last.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    started = int(time.time())
    model = {"id": served.name, "object": "model", "created": started, "owned_by": "mllm"}
    _add_refusals(app)

    @app.get("/health")
    async def health() -> Response:
        is_alive = service.scheduler.is_alive
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != served.name:
            raise RequestError(404, f"there is no such model; allowed: {served.name}", code="model_not_found")
        return JSONResponse(model)

    @app.get("/v1/budgets")
    async def budgets() -> Response:
        return JSONResponse({"object": "list", "model": served.name, **served.settings, "data": list(served.budgets)})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _chat(request, service, served)

    @app.post("/v1/audio/transcriptions")
    async def transcribe(request: Request) -> Response:
        return await _transcribe(request, service, served)

    return app


def _add_refusals(app: FastAPI) -> None:
    """Answer everything that goes wrong in one form; what our own mistakes were stands in the log alone."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = {404: "there is no such route", 405: "this route does not take this method"}
        message = said.get(error.status_code, "the body cannot be read")
        return JSONResponse(RequestError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return LEFT

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        message = "the server made a mistake; its log says which"
        return JSONResponse(RequestError(500, message, code="internal_error").body, 500)


async def _while_there(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something for a client whose body has been read, as long as it is there.

    Raises:
        ClientLeft: it has left; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_has_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _has_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _finish(job: Job) -> None:
    try:
        await job.is_done.wait()
    except asyncio.CancelledError:
        job.cancel()
        raise


class _Stream(StreamingResponse):
    """Sends events about a job, which is cancelled when the client leaves, though it be before the first of them."""

    def __init__(self, events: AsyncIterator[bytes], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _chat(request: Request, service: Service, served: Served) -> Response:
    _check_type(request, "application/json")
    body = await request.body()

    async def begin() -> tuple[ChatRequest, Job]:
        chat = await service.read(lambda is_left: served.chat.read(read_json(body)))
        return chat, await service.begin(chat.conversation, chat.rules, num_choices=chat.num_choices)

    chat, job = await _while_there(request, begin())
    answer = ChatAnswer(served.name, chat.has_token_ids)
    if chat.is_stream:
        return _Stream(_chat_events(job, answer, service, has_usage=chat.has_usage), job)
    await _while_there(request, _finish(job))
    _count(job, service)
    return JSONResponse(answer.whole(job.answers(), job.usage()))


async def _chat_events(job: Job, answer: ChatAnswer, service: Service, *, has_usage: bool) -> AsyncIterator[bytes]:
    for number in range(len(job.choices)):
        yield event(answer.opening(number))
    async for number, piece in job.pieces():
        yield event(answer.piece(number, piece))
    _count(job, service)
    try:
        for number, choice in enumerate(job.answers()):
            yield event(answer.closing(number, choice))
        if has_usage:
            yield event(answer.usage(job.usage()))
    except RequestError as error:
        yield event(error.body)
    yield DONE


async def _transcribe(request: Request, service: Service, served: Served) -> Response:
    _check_type(request, "multipart/form-data")
    form, content = await _read_form(request)

    async def begin() -> tuple[TranscriptionRequest, Job]:
        reader, loader = served.transcription, service.preparer.loader
        transcription = await service.read(lambda is_left: reader.read(form, content, loader.until(is_left)))
        return transcription, await service.begin(transcription.conversation, transcription.rules)

    transcription, job = await _while_there(request, begin())
    if transcription.is_stream:
        return _Stream(_transcript_events(job, service), job)
    await _while_there(request, _finish(job))
    _count(job, service)
    choice = job.answers()[0]
    if transcription.form == "text":
        return PlainTextResponse(f"{choice.text}\n")
    seconds = job.seconds(service.preparer.loader)
    form_of_answer, language = transcription.form, transcription.language
    return JSONResponse(transcript_of(choice, job.usage(), form=form_of_answer, language=language, seconds=seconds))


async def _transcript_events(job: Job, service: Service) -> AsyncIterator[bytes]:
    async for _, piece in job.pieces():
        yield event({"type": "transcript.text.delta", "delta": piece})
    _count(job, service)
    try:
        text = job.answers()[0].text
        yield event(
            {"type": "transcript.text.done", "text": text, "usage": {"type": "tokens", **transcript_usage(job.usage())}}
        )
    except RequestError as error:
        yield event({"type": "error", **error.body})
    yield DONE


async def _read_form(request: Request) -> tuple[dict[str, object], bytes]:
    """Return the fields of a form but the file, and what the file holds.

    Raises:
        RequestError: 400, no file, or a field that is given twice.
    """
    async with request.form(max_files=1, max_fields=MAX_FORM_FIELDS) as form:
        names = [name for name, _ in form.multi_items()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise bad_request(f"{twice[0][:64]!r} is given twice", "form")
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise bad_request("file is missing: audio or a video", "file")
        if other := [name for name, value in form.items() if isinstance(value, UploadFile) and name != "file"]:
            raise bad_request(f"{other[0][:64]!r} is a file; allowed: file", "form")
        return {name: value for name, value in form.items() if name != "file"}, await file.read()


def _check_type(request: Request, wanted: str) -> None:
    """Refuse bodies of another type, which pages of other sites may send to this machine without asking.

    Raises:
        RequestError: 415.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != wanted:
        raise RequestError(415, f"content-type must be {wanted}", param="content-type")


def _count(job: Job, service: Service) -> None:
    """Put what a request took into the metrics."""
    used = job.usage()
    service.metrics.prompt_tokens.inc(used.prompt_tokens)
    service.metrics.new_tokens.inc(used.completion_tokens)
    for item in used.media:
        service.metrics.soft_tokens.labels(item.medium).inc(item.tokens)
