"""Asks the server that a page is part of, in the form of its own API, under its own rules.

A page is one more client: its requests carry the key, and count against the limits, as anybody's do. They reach the
application without a connection.

Knows the forms of requests and answers. Does not know pages or models.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from mllm.serving.errors import RequestError

ROUTE = "/v1/chat/completions"


@dataclass(frozen=True)
class PageMedium:
    """A file of a request, and its budget as the grammar writes it; None leaves that to another of the same request."""

    medium: str
    content: bytes
    budget: str | None


@dataclass(frozen=True)
class Answered:
    """What the server answered.

    Args:
        tokens: exact soft tokens, by medium.
        is_cut: it had not ended when it was as long as answers may be.
    """

    text: str
    budget: str | None
    tokens: Mapping[str, int]
    prompt_tokens: int
    new_tokens: int
    is_trained: bool
    is_cut: bool

    @property
    def line(self) -> str:
        """What is told below an answer."""
        used = ", ".join(f"{medium} {count}" for medium, count in self.tokens.items()) or "none"
        marks = "" if self.is_trained else " (this budget was not trained)"
        marks += " · the answer was cut, it had not ended" if self.is_cut else ""
        return f"soft tokens: {used}{marks} · prompt {self.prompt_tokens}, answer {self.new_tokens} tokens"


class Client:
    """Sends requests to an application.

    Args:
        app: an ASGI application, the guard of its limits in front.
        key: that its clients must send; None where it asks for none.
        model: the name it is served under.
    """

    def __init__(self, app: Any, *, key: str | None, model: str) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://page", headers=headers, timeout=None)
        self._model = model

    def body(self, question: str, media: Sequence[PageMedium], **options: Any) -> dict[str, Any]:
        """Write a chat request: media in their order, and then the question."""
        parts = [_part(medium) for medium in media]
        content = [*parts, {"type": "text", "text": question}]
        return {"model": self._model, "messages": [{"role": "user", "content": content}], **options}

    async def answer(self, body: Mapping[str, Any]) -> Answered:
        """Send a request and wait for the answer.

        Raises:
            RequestError: the server refused it, or failed; the message is the server's.
        """
        response = await self._http.post(ROUTE, json=body)
        values = response.json()
        if response.status_code != 200:
            raise RequestError(response.status_code, values["error"]["message"])
        choice, usage = values["choices"][0], values["usage"]
        return Answered(
            text=choice["message"]["content"],
            budget=usage["budget"],
            tokens={key.removesuffix("_tokens"): count for key, count in usage["prompt_tokens_details"].items()},
            prompt_tokens=usage["prompt_tokens"],
            new_tokens=usage["completion_tokens"],
            is_trained=usage["is_trained"],
            is_cut=choice["finish_reason"] == "length",
        )


def _part(medium: PageMedium) -> dict[str, Any]:
    """Write a file as a data URL without a type: what it is shows by what it holds."""
    url = f"data:application/octet-stream;base64,{base64.b64encode(medium.content).decode()}"
    budget = {} if medium.budget is None else {"budget": medium.budget}
    return {"type": f"{medium.medium}_url", f"{medium.medium}_url": {"url": url}, **budget}
