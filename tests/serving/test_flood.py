"""A flood of requests ends nothing: what is admitted is answered, the rest is refused at once, and memory stays."""

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from toy_server import NAME, Running, part, server, user

Files = list[dict[str, bytes]]
GOAL_SECONDS = 0.25
"""By then 99 of 100 requests that are too many are told so."""


@dataclass
class Flood:
    """What became of many requests: seconds by status."""

    seconds: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)

    @property
    def refused(self) -> list[float]:
        """Seconds of those that were told to come back."""
        return [*self.seconds.get(429, []), *self.seconds.get(503, [])]


async def answered(running: Running, bodies: Iterator[bytes], flood: Flood) -> None:
    """Send one request after the other on one connection, which is opened anew when the server closes it.

    By hand, since a client library would take more time than the server does.
    """
    reader = writer = None
    for body in bodies:
        start = time.monotonic()
        if writer is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length:")[2].split()[0])
        await reader.readexactly(length)
        flood.add(int(answer.split()[1]), time.monotonic() - start)
        if b"connection: close" in answer.lower():
            writer.close()
            writer = None


def flooded(running: Running, files: Files, *, number: int, at_once: int) -> Flood:
    """Send requests, so many at a time."""
    media = [part(medium, own[medium]) for own in files for medium in ("image", "audio")]
    kinds = [
        json.dumps({"model": NAME, "messages": user(*parts, "what?"), "max_tokens": 8}).encode()
        for parts in ([], *[[own] for own in media])
    ]
    bodies = (kinds[place % len(kinds)] for place in range(number))
    flood = Flood()

    async def all_of_them() -> None:
        await asyncio.gather(*(answered(running, bodies, flood) for _ in range(at_once)))

    asyncio.run(all_of_them())
    return flood


def busy_answers(running: Running, seconds: float) -> tuple[int, int]:
    """How many refusals the server has sent within some seconds of their request's first byte, and how many in all.

    The server's own clock: on a machine with two cores this client takes as much time as the server does.
    """
    text = httpx.get(f"{running.address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("mllm_busy_seconds"))
    return int(float(values[f'mllm_busy_seconds_bucket{{le="{seconds}"}}'])), int(
        float(values["mllm_busy_seconds_count"])
    )


@pytest.mark.parametrize(
    ("number", "at_once"), [(500, 100), pytest.param(5_000, 200, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_flood_is_refused_and_the_server_goes_on(run: Path, files: Files, number: int, at_once: int) -> None:
    with server(run, "--measure_budgets", "false", "--requests.max_requests", "48") as running:
        flooded(running, files, number=60, at_once=20)  # what a process does only once
        before = running.memory_bytes
        start = time.monotonic()
        flood = flooded(running, files, number=number, at_once=at_once)
        seconds = time.monotonic() - start
        grown = running.memory_bytes - before
        start = time.monotonic()
        assert httpx.get(f"{running.address}/health").status_code == 200
        body = {"model": NAME, "messages": user("what?"), "max_tokens": 8}
        assert httpx.post(f"{running.url}/chat/completions", json=body).status_code == 200
        assert time.monotonic() - start < 2
        assert set(flood.seconds) == {200, 429}, {status: len(own) for status, own in flood.seconds.items()}
        assert sum(map(len, flood.seconds.values())) == number
        assert len(flood.seconds[200]) >= 48
        assert grown < 300 * 2**20
        in_time, refused = busy_answers(running, GOAL_SECONDS)
        assert refused == len(flood.refused)
        assert in_time >= 0.99 * refused, f"{refused - in_time} of {refused} refusals took longer than {GOAL_SECONDS} s"
        assert not [line for line in running.lines if "Traceback" in line]
        served, late = len(flood.seconds[200]), statistics.quantiles(flood.refused, n=100)[98]
        print(  # noqa: T201
            f"{served} of {number} answered in {seconds:.1f} s; {in_time} of {refused} refusals within {GOAL_SECONDS} s "
            f"in the server, p99 {late:.3f} s at this client; +{grown >> 20} MiB"
        )
