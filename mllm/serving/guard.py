"""Guards the application: by the key, the number of requests and bytes at once, and the time of slow clients.

Knows ASGI and uvicorn's protocol. Does not know routes' contents or models.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mllm.serving.errors import RequestError
from mllm.serving.limits import RequestLimits
from mllm.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN_ROUTE = "/health"
"""The only route that needs no key."""
PAGE_ROUTE = "/page"
"""What browsers open; they ask their user for a name, which may be any, and for a password, which is the key."""
ROUTES = (
    "/health",
    "/metrics",
    "/v1/audio/transcriptions",
    "/v1/budgets",
    "/v1/chat/completions",
    "/v1/models",
)
BUSY_SECONDS = 1.0
BUSY_STATUSES = (429, 503)


class _SlowReader(Exception):
    """Says that a client does not take its answer."""


class Guard:
    """Lets requests through to an application, or answers them itself.

    Args:
        key: what clients must send as `Authorization: Bearer KEY`; None asks for none.
    """

    def __init__(self, app: Any, limits: RequestLimits, metrics: Metrics, *, key: str | None) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self._digest = None if key is None else _digest(key.encode())
        self._head_bytes = limits.max_header_bytes
        self.num_requests = 0
        self.num_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        start = time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if status in BUSY_STATUSES:  # so short that it goes out at once; a timer would take longer
                await send(message)
                return
            try:
                await asyncio.wait_for(send(message), self.limits.send_seconds)
            except TimeoutError:
                raise _SlowReader from None

        try:
            await self._admit(scope, receive, counted)
        except _SlowReader:  # the connection is closed, since its answer is not whole
            status = 499
        finally:
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        # uvicorn limits heads that come in pieces, and not one that is there at once.
        fields = [scope["raw_path"], scope["query_string"], *(text for pair in scope["headers"] for text in pair)]
        if sum(map(len, fields)) > self._head_bytes:
            await refuse(send, RequestError(431, f"the head is larger than {self._head_bytes:,} bytes"))
            return
        is_page = scope["path"] == PAGE_ROUTE or scope["path"].startswith(f"{PAGE_ROUTE}/")
        if scope["path"] != OPEN_ROUTE and not self._has_key(headers, is_page):
            how = "log in with any name and the key as password" if is_page else "send Authorization: Bearer KEY"
            challenge = 'Basic realm="mllm", charset="UTF-8"' if is_page else "Bearer"
            await refuse(send, RequestError(401, f"the key is missing or wrong; {how}", challenge=challenge))
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.num_requests >= self.limits.max_requests:
            message = f"{self.num_requests} requests are being answered, which is as many as may be; come back"
            await refuse(send, RequestError(429, message, code="busy", retry_after_seconds=BUSY_SECONDS))
            return
        self.num_requests += 1
        body = _Body(self, receive, headers)
        try:
            body.check_stated()
            await self.app(scope, body.receive, send)
        except RequestError as error:
            await refuse(send, error)
        finally:
            self.num_requests -= 1
            self.num_bytes -= body.num_bytes

    def _has_key(self, headers: dict[bytes, bytes], is_page: bool) -> bool:
        if self._digest is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if is_page and scheme.lower() == b"basic":
            scheme, key = b"bearer", _password(key)
        # Digests are equally long, so that the time tells nothing of the key, not even its length.
        return hmac.compare_digest(_digest(key.strip()), self._digest) and scheme.lower() == b"bearer"


class _Body:
    """Receives the body of one request as it comes, within the limits of one and of all."""

    def __init__(self, guard: Guard, receive: Receive, headers: dict[bytes, bytes]) -> None:
        self._guard, self._receive, self._headers = guard, receive, headers
        self._end = time.monotonic() + guard.limits.read_seconds
        self._is_whole = False
        self.num_bytes = 0

    def check_stated(self) -> None:
        """Refuse a body by the length that its head states.

        Raises:
            RequestError: 413, or 503 where there are too many bytes of others.
        """
        stated = self._headers.get(b"content-length", b"")
        if stated.isdigit():
            self._check(int(stated))

    async def receive(self) -> Message:
        """Return the next piece of the body, and later that the client has left.

        Raises:
            RequestError: 408, 413 or 503.
        """
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(self._end - time.monotonic(), 0.001))
        except TimeoutError:
            seconds = self._guard.limits.read_seconds
            raise RequestError(408, f"the body did not come within {seconds:g} seconds", code="timeout") from None
        if message["type"] != "http.request":
            self._is_whole = True
            return message
        size = len(message.get("body", b""))
        self._check(self.num_bytes + size)
        self.num_bytes += size
        self._guard.num_bytes += size
        self._is_whole = not message.get("more_body", False)
        return message

    def _check(self, num_bytes: int) -> None:
        limits = self._guard.limits
        if num_bytes > limits.max_body_bytes:
            raise RequestError(413, f"the body is larger than {limits.max_body_bytes:,} bytes", code="too_large")
        if self._guard.num_bytes + num_bytes - self.num_bytes > limits.max_bytes_in_flight:
            message = "the bodies of other requests take all the room there is; come back"
            raise RequestError(503, message, code="busy", retry_after_seconds=BUSY_SECONDS)


async def refuse(send: Send, error: RequestError) -> None:
    """Answer in place of the application."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _password(given: bytes) -> bytes:
    """Read the password of HTTP's basic form, name:password in base64; empty where it is none."""
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class TimedProtocol(H11Protocol):
    """Closes a connection that does not begin a request within some seconds, and again after every answer.

    uvicorn itself waits for ever for the first request of a connection, and for the rest of a head that has begun.
    """

    head_seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """Make uvicorn's protocol one that closes connections on which no whole head of a request comes in time."""
    return type("TimedProtocol", (TimedProtocol,), {"head_seconds": seconds})


__all__ = ["PAGE_ROUTE", "ROUTES", "Guard", "refuse", "timed_protocol"]
