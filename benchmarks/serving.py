"""Requests to a server: ours beside one that answers one request at a time, as the released demos do.

    python benchmarks/serving.py [--repeats 2] [--threads 1] [--requests 64] [--clients 1 8 32] [--ragged 0]

Both are processes of their own on loopback, on the same HTTP library, with the same model: the demo's frozen encoders
and LLM with an untrained compressor, which computes the same. The other server holds a lock and calls `Answerer.answer`
for each request, which streams its answer: no batches, no cache, decoding in the same process. Each turn sends the same
requests, a quarter each about an image, a sound, lips, and sound with lips, at mixed budgets, all media different; the
servers take turns, and ours forgets no media between turns, so that every turn has media of its own.

Answers have 6 tokens, or with --ragged 1 from 8 to 105. Answers of both are compared, and any difference stops the
benchmark. Shown are requests per second, CPU seconds of the server's processes per request, and the seconds to the
first piece and to the end of an answer (p50, p99).
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import Outcome, append, timed
from PIL import Image
from rich.console import Console
from rich.table import Table
from turns import options

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

GOAL = 3.0
GOAL_CLIENTS = 32
KINDS = (("image",), ("audio",), ("video",), ("audio", "video"))
BUDGETS = {
    "image": ("image=64", "image=16", "image=4"),
    "audio": ("audio=/4", "audio=/8"),
    "video": ("video=/2", "video=/5"),
}
SHORT_TOKENS, RAGGED_TOKENS = 6, (8, 105)
TICKS = os.sysconf("SC_CLK_TCK")
ONE_AT_A_TIME = "--one-at-a-time"


@dataclass(frozen=True)
class Asked:
    """One request: its body, and nothing of how it is sent."""

    body: dict[str, Any]


@dataclass
class Sent:
    """What became of some requests: texts, seconds to the first piece and to the end, and what they took together."""

    texts: list[str]
    firsts: list[float]
    totals: list[float]
    wall_seconds: float
    cpu_seconds: float


@dataclass
class Way:
    """A server that is measured, and every turn of it by the number of clients."""

    name: str
    url: str
    process: subprocess.Popen[str]
    turns: dict[int, list[Sent]] = field(default_factory=dict)


def write_model(folder: Path) -> Path:
    """Save the demo's model as it is before training; what it computes does not depend on that."""
    import yaml

    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.config.run import read_run_config
    from mllm.model.trainables import set_trainables
    from mllm.synthetic.demo.demo import RECIPE

    model, processor = build(read_run_config(yaml.safe_load(RECIPE.read_text())).model)
    set_trainables(model)
    save_run(model, processor, folder / "model")
    return folder / "model"


def media_of(kind: Sequence[str], rng: np.random.Generator, folder: Path) -> dict[str, bytes]:
    """Files of noise: 1 to 2 seconds of sound and of lips, or an image of 64 x 64."""
    from mllm.media import write_audio, write_video

    seconds = int(rng.integers(25, 50)) / 25
    made = {}
    for medium in kind:
        path = folder / medium
        if medium == "image":
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, format="png")
        elif medium == "audio":
            write_audio(path, rng.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32))
        else:
            write_video(path, rng.integers(0, 256, (round(seconds * 25), 48, 48), dtype=np.uint8))
        made[medium] = path.read_bytes()
    return made


def requests_of(number: int, seed: int, folder: Path, *, ragged: bool) -> list[Asked]:
    """Requests whose media nobody has seen before."""
    rng, choice = np.random.default_rng(seed), random.Random(seed)
    types = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
    found = []
    for place in range(number):
        media = media_of(KINDS[place % len(KINDS)], rng, folder)
        parts: list[dict[str, Any]] = [
            {"type": f"{m}_url", f"{m}_url": {"url": f"data:{types[m]};base64,{base64.b64encode(own).decode()}"}}
            for m, own in media.items()
        ]
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}],
            "budget": ",".join(choice.choice(BUDGETS[medium]) for medium in media),
            "max_tokens": choice.randint(*RAGGED_TOKENS) if ragged else SHORT_TOKENS,
            "stream": True,
            "ignore_eos": True,
        }
        found.append(Asked(body))
    return found


@contextlib.contextmanager
def started(command: list[str], threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process and its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"at (http://\S+)/v1", line):
                break
        else:
            raise SystemExit("".join(said))
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
        yield found[1], process
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of those it has started."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = stat.read_text().rpartition(") ")
            values = rest.split()
            if int(stat.parent.name) == pid or int(values[1]) == pid:
                total += (int(values[11]) + int(values[12])) / TICKS
    return total


async def send(client: Any, url: str, asked: Asked) -> tuple[str, float, float]:
    """One request; its text, and the seconds to the first piece and to the end."""
    start, first, pieces = time.perf_counter(), 0.0, []
    async with client.stream("POST", f"{url}/v1/chat/completions", json=asked.body) as answer:
        if answer.status_code != 200:
            raise SystemExit((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
            if piece:
                first = first or time.perf_counter() - start
                pieces.append(piece)
    total = time.perf_counter() - start
    return "".join(pieces).strip(), first or total, total


async def send_all(url: str, requests: Sequence[Asked], clients: int) -> list[tuple[str, float, float]]:
    """All requests, each client one after the other."""
    import httpx

    found: list[Any] = [None] * len(requests)
    waiting = iter(range(len(requests)))
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def one_client() -> None:
            for place in waiting:
                found[place] = await send(client, url, requests[place])

        await asyncio.gather(*(one_client() for _ in range(clients)))
    return found


def turn(way: Way, requests: Sequence[Asked], clients: int) -> Sent:
    """Send requests to a server, and measure it."""
    cpu, wall = cpu_seconds(way.process.pid), time.perf_counter()
    found = asyncio.run(send_all(way.url, requests, clients))
    wall, cpu = time.perf_counter() - wall, cpu_seconds(way.process.pid) - cpu
    texts, firsts, totals = zip(*found, strict=True)
    return Sent(list(texts), list(firsts), list(totals), wall, cpu)


def compare(given: argparse.Namespace, folder: Path) -> tuple[Table, list[Outcome]]:
    """Both servers in turns, for every number of clients."""
    model = str(write_model(folder))
    ours = [sys.executable, "-m", "mllm", "serve", "--model", model, "--port", "0", "--use_cpu"]
    ours += ["--measure_budgets", "false", "--threads", str(given.threads)]
    other = [sys.executable, __file__, ONE_AT_A_TIME, model]
    with started(other, given.threads) as one, started(ours, given.threads) as many:
        ways = [Way("one at a time", *one), Way("mllm serve", *many)]
        seed = 0
        for number in range(given.repeats + 1):
            for clients in given.clients:
                seed += 1
                requests = requests_of(given.requests, seed, folder, ragged=bool(given.ragged))
                for way in ways[:: 1 if number % 2 else -1]:
                    sent = turn(way, requests, clients)
                    way.turns.setdefault(clients, []).append(sent)
                last = [way.turns[clients][-1].texts for way in ways]
                if last[0] != last[1]:
                    differing = sum(a != b for a, b in zip(*last, strict=True))
                    raise SystemExit(f"{differing} of {len(last[0])} answers differ at {clients} clients")
    for way in ways:
        way.turns = {clients: turns[1:] for clients, turns in way.turns.items()}  # the first warms up
    return table_of(ways, given), [outcome_of(ways, clients, given) for clients in given.clients]


def outcome_of(ways: Sequence[Way], clients: int, given: argparse.Namespace) -> Outcome:
    """CPU seconds per request of both."""
    one, many = ([sent.cpu_seconds / given.requests for sent in way.turns[clients]] for way in ways)
    answers = "ragged answers" if given.ragged else "short answers"
    return timed(
        f"requests per CPU second at {clients} clients, {answers}",
        "one request at a time",
        one,
        many,
        check="texts equal",
        goal=GOAL if clients == GOAL_CLIENTS and not given.ragged else None,
    )


def table_of(ways: Sequence[Way], given: argparse.Namespace) -> Table:
    """What every server did at every number of clients."""
    table = Table(title=f"{given.requests} requests a turn, medians of {given.repeats} turns: milliseconds")
    for column in ("server", "clients", "requests/s", "CPU ms", "first p50", "first p99", "total p50", "total p99"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for clients in given.clients:
        for way in ways:
            turns = way.turns[clients]
            cells = [
                f"{statistics.median(given.requests / sent.wall_seconds for sent in turns):.1f}",
                f"{1000 * statistics.median(sent.cpu_seconds / given.requests for sent in turns):.1f}",
            ]
            for values in (
                [own for sent in turns for own in sent.firsts],
                [own for sent in turns for own in sent.totals],
            ):
                marks = statistics.quantiles(values, n=100)
                cells += [f"{1000 * marks[49]:.0f}", f"{1000 * marks[98]:.0f}"]
            table.add_row(way.name, str(clients), *cells)
    return table


def serve_one_at_a_time(folder: str) -> None:
    """Answer requests in the order they come, each by itself, as a demo does that wraps a model's `generate`."""
    import queue
    import socket

    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    from mllm.checkpoints.load import load
    from mllm.inference.answerer import Answerer, Decoding

    model, processor = load(folder, device="cpu")
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(events(body), media_type="text/event-stream")

    def events(body: dict[str, Any]) -> Iterator[bytes]:
        parts = body["messages"][0]["content"]
        media = {
            part["type"].removesuffix("_url"): part[part["type"]]["url"] for part in parts if part["type"] != "text"
        }
        text = next(part["text"] for part in parts if part["type"] == "text")
        pieces: queue.Queue[str | None] = queue.Queue()
        answerer = Answerer(model, processor, Decoding(max_new_tokens=body["max_tokens"], ignores_end=True))

        def answer() -> None:
            with lock:
                model.generation_config.eos_token_id = None  # `generate` asks it where it is told of no end
                answerer.answer(text, **media, budget=body["budget"], on_text=pieces.put)
            pieces.put(None)

        threading.Thread(target=answer).start()
        while (piece := pieces.get()) is not None:
            yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n".encode()

    listener = socket.create_server(("127.0.0.1", 0))
    sys.stderr.write(f"serving at http://127.0.0.1:{listener.getsockname()[1]}/v1\n")
    sys.stderr.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", http="h11")).run(sockets=[listener])


def main() -> None:
    given = options(__doc__, 2, requests=64, clients=[1, 8, 32], ragged=0)
    with tempfile.TemporaryDirectory() as folder:
        table, outcomes = compare(given, Path(folder))
    Console(width=140).print(table)
    append(outcomes, given.results)


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE_AT_A_TIME]:
        serve_one_at_a_time(sys.argv[2])
    else:
        main()
