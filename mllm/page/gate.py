"""Stands between a server and its page, and lets through what the page needs.

Gradio serves more than this page uses: proxies, other pages' files, addresses that it would fetch. None of that is
reached. What a browser runs of the page may speak to this server alone.

Knows ASGI and Gradio's routes. Does not know what the page shows.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from mllm.page.uploads import Uploads
from mllm.serving.errors import RequestError, bad_request
from mllm.serving.guard import PAGE_ROUTE, refuse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
API = f"{PAGE_ROUTE}/gradio_api"
_GET = re.compile(
    rf"{PAGE_ROUTE}/?|{PAGE_ROUTE}/(config/?|theme\.css|manifest\.json|favicon\.ico|(assets|static|svelte)/.+)"
    rf"|{API}/(info/?|app_id/?|startup-events|theme\.css|queue/data|upload_progress|heartbeat/\w+)"
)
_FILE = f"{API}/file="
_POST = re.compile(rf"{API}/(upload|queue/join/?|reset/?|cancel/?)")
MAX_EVENT_BYTES = 1 << 20
"""Largest body but a file: what a page says of its fields when a button is pressed."""
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # Gradio's own page is written so
        "style-src 'self' 'unsafe-inline'",
        *(f"{kind}-src 'self' data: blob:" for kind in ("img", "media", "font", "connect", "worker")),
        "frame-ancestors 'none'",
        "form-action 'self'",
        "base-uri 'self'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]


class Gate:
    """Lets requests for the page through, and everything else that is none of the page's.

    Args:
        app: the application, with Gradio mounted at `PAGE_ROUTE`.
        upload_bytes: largest upload.
    """

    def __init__(self, app: Any, uploads: Uploads, *, upload_bytes: int) -> None:
        self.app = app
        self.uploads = uploads
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == PAGE_ROUTE or path.startswith(f"{PAGE_ROUTE}/")):
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] == "POST" and path == f"{API}/upload":
                await asyncio.to_thread(self.uploads.make_room, self.upload_bytes)
            elif scope["method"] == "POST":
                receive = await self._checked_event(receive)
        except RequestError as error:
            await refuse(send, error)
            return

        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, receive, closed)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse routes that the page does not use, and what pages of other sites send.

        Raises:
            RequestError: 403, 404.
        """
        path, method = scope["path"], scope["method"]
        if method == "POST":
            if _POST.fullmatch(path):
                _check_origin(dict(scope["headers"]))
                return
        elif method in ("GET", "HEAD") and (
            _GET.fullmatch(path) or (path.startswith(_FILE) and self.uploads.holds(unquote(path.removeprefix(_FILE))))
        ):
            return
        raise RequestError(404, "there is no such route")

    async def _checked_event(self, receive: Receive) -> Receive:
        """Read what the page says of its fields; files that it names must be uploads.

        Gradio itself would fetch a file whose path is an address.

        Raises:
            RequestError: 400, 413.
        """
        body, is_whole = bytearray(), False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise bad_request("the body is not whole")
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > MAX_EVENT_BYTES:
                raise RequestError(413, f"the body is larger than {MAX_EVENT_BYTES:,} bytes", code="too_large")
        try:
            values = json.loads(bytes(body)) if body else None
        except (ValueError, RecursionError):
            raise bad_request("the body is not JSON") from None
        if not all(self.uploads.holds(path) for path in _paths(values)):
            raise bad_request("a file is named that was not uploaded")
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again


def _paths(values: Any) -> Iterator[object]:
    """Everything in JSON that Gradio would take for the path of a file."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_origin(headers: dict[bytes, bytes]) -> None:
    """Refuse what a page of another site has a browser send, whose key the browser would add by itself.

    Raises:
        RequestError: 403.
    """
    origin = headers.get(b"origin")
    if origin is not None and urlsplit(origin.decode("latin-1")).netloc != headers.get(b"host", b"").decode("latin-1"):
        raise RequestError(403, "this is sent by a page of another site")


__all__ = ["API", "POLICY", "Gate"]
