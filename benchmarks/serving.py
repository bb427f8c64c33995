"""Requests to a server: ours beside one that answers one request at a time, as the released demos do, and ours on vLLM.

    python benchmarks/serving.py [--repeats 2] [--threads 1] [--requests 64] [--clients 1 8 32] [--ragged 0]
        [--questions 1] [--vllm 0]

All are processes of their own on loopback, on the same HTTP library, with the same model: the demo's frozen encoders
and LLM with an untrained compressor, which computes the same. The other server holds a lock and calls `Answerer.answer`
for each request, which streams its answer: no batches, no cache, decoding in the same process. With --vllm 1, in an
environment that has vLLM, `mllm serve --engine vllm` on an export of the model is a third. Each turn sends the same
requests, a quarter each about an image, audio, video of lips, and audio with video, at mixed budgets; the servers take
turns, and ours forgets no media between turns, so that every turn has media of its own. With --questions 8 eight
questions follow each other about the same media, of which ours encodes each once; else all media differ.

Answers have 6 tokens, or with --ragged 1 from 8 to 105. Token ids of all are compared, and any difference stops the
benchmark before it shows a figure. Shown are requests per second, CPU seconds of the server's processes per request,
and the seconds to the first piece and to the end of an answer (p50, p99).
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
GOAL = 3.0
GOAL_CLIENTS = 32
KINDS = (("image",), ("audio",), ("video",), ("audio", "video"))
BUDGETS = {
    "image": ("image=64", "image=16", "image=4"),
    "audio": ("audio=/4", "audio=/8"),
    "video": ("video=/2", "video=/5"),
}
SHORT_TOKENS, RAGGED_TOKENS = 6, (8, 105)
QUESTIONS = (
    "what is it?",
    "which colour is it?",
    "how large is it?",
    "what is said?",
    "who speaks?",
    "is it loud?",
    "where is it?",
    "what comes last?",
)
TICKS = os.sysconf("SC_CLK_TCK")
ONE_AT_A_TIME = "--one-at-a-time"


@dataclass(frozen=True)
class Answered:
    """The answer to one request: its token ids, and seconds to its first piece and to its end."""

    ids: list[int]
    first: float
    total: float


@dataclass
class Turn:
    """What became of some requests: ids, seconds to the first piece and to the end, and what they took together."""

    ids: list[list[int]]
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
    turns: dict[int, list[Turn]] = field(default_factory=dict)


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
    """Make files of noise: 1 to 2 seconds of audio and of lips, or an image of 64 x 64."""
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


def requests_of(number: int, seed: int, folder: Path, *, ragged: bool, questions: int = 1) -> list[dict[str, Any]]:
    """Make the bodies of requests about media that nobody has seen before, with so many questions about each."""
    rng, choice = np.random.default_rng(seed), random.Random(seed)
    types = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
    bodies: list[dict[str, Any]] = []
    media: dict[str, bytes] = {}
    for index in range(number):
        if index % questions == 0:
            media = media_of(KINDS[index // questions % len(KINDS)], rng, folder)
        parts: list[dict[str, Any]] = [
            {"type": f"{m}_url", f"{m}_url": {"url": f"data:{types[m]};base64,{base64.b64encode(content).decode()}"}}
            for m, content in media.items()
        ]
        text = {"type": "text", "text": QUESTIONS[index % questions % len(QUESTIONS)]}
        bodies.append(
            {
                "model": "model",
                "messages": [{"role": "user", "content": [*parts, text]}],
                "budget": ",".join(choice.choice(BUDGETS[medium]) for medium in media),
                "max_tokens": choice.randint(*RAGGED_TOKENS) if ragged else SHORT_TOKENS,
                "stream": True,
                "ignore_eos": True,
                "return_token_ids": True,
            }
        )
    return bodies


@contextlib.contextmanager
def started(command: list[str], threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server process, and give its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if address := re.search(r"at (http://\S+)/v1", line):
                break
        else:
            raise SystemExit("".join(lines))
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
        yield address[1], process
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Add up the CPU seconds of a process and of those that descend from it."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = stat.read_text().rpartition(") ")
            values = rest.split()
            parents[int(stat.parent.name)] = int(values[1])
            seconds[int(stat.parent.name)] = (int(values[11]) + int(values[12])) / TICKS
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(seconds.get(member, 0.0) for member in family)


async def send(client: Any, url: str, body: dict[str, Any]) -> Answered:
    """Send one request."""
    start, first = time.perf_counter(), 0.0
    ids: list[int] = []
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                ids = choice.get("token_ids", ids)
    total = time.perf_counter() - start
    return Answered(ids, first or total, total)


async def send_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answered]:
    """Send all requests, each client one after the other."""
    import httpx

    answers: dict[int, Answered] = {}
    waiting = iter(range(len(bodies)))
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def one_client() -> None:
            for index in waiting:
                answers[index] = await send(client, url, bodies[index])

        await asyncio.gather(*(one_client() for _ in range(clients)))
    return [answers[index] for index in range(len(bodies))]


def turn_of(way: Way, bodies: Sequence[dict[str, Any]], clients: int) -> Turn:
    """Send requests to a server, and measure it."""
    cpu, wall = cpu_seconds(way.process.pid), time.perf_counter()
    answers = asyncio.run(send_all(way.url, bodies, clients))
    wall, cpu = time.perf_counter() - wall, cpu_seconds(way.process.pid) - cpu
    firsts, totals = [answer.first for answer in answers], [answer.total for answer in answers]
    return Turn([answer.ids for answer in answers], firsts, totals, wall, cpu)


def commands_of(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Say how the servers are started, by their names; the first is the one the others are compared with."""
    from mllm.checkpoints.export import export

    model = write_model(folder)
    serve = [sys.executable, "-m", "mllm", "serve", "--port", "0", "--threads", str(arguments.threads)]
    commands = {
        "one at a time": [sys.executable, __file__, ONE_AT_A_TIME, str(model)],
        "mllm serve": [*serve, "--use_cpu", "--measure_budgets", "false", "--model", str(model)],
    }
    if arguments.vllm:
        export(model, folder / "exported")
        words = ("--engine", "vllm", "--name", "model", "--model", str(folder / "exported"))
        commands["mllm serve, vLLM"] = [*serve, *words]
    return commands


def compare(arguments: argparse.Namespace, folder: Path) -> tuple[Table, list[Outcome]]:
    """Measure the servers in turns, for every number of clients."""
    with contextlib.ExitStack() as stack:
        ways = [
            Way(name, *stack.enter_context(started(command, arguments.threads)))
            for name, command in commands_of(arguments, folder).items()
        ]
        seed = 0
        for number in range(arguments.repeats + 1):
            for clients in arguments.clients:
                seed += 1
                ragged, questions = bool(arguments.ragged), arguments.questions
                bodies = requests_of(arguments.requests, seed, folder, ragged=ragged, questions=questions)
                for way in ways[:: 1 if number % 2 else -1]:
                    way.turns.setdefault(clients, []).append(turn_of(way, bodies, clients))
                expected = ways[0].turns[clients][-1].ids
                for way in ways[1:]:
                    differing = sum(a != b or not a for a, b in zip(expected, way.turns[clients][-1].ids, strict=True))
                    if differing:
                        raise SystemExit(f"{differing} answers of {way.name} differ at {clients} clients")
    for way in ways:
        way.turns = {clients: turns[1:] for clients, turns in way.turns.items()}  # the first warms up
    outcomes = [outcome_of(ways[0], way, clients, arguments) for clients in arguments.clients for way in ways[1:]]
    return table_of(ways, arguments), outcomes


def outcome_of(peer: Way, ours: Way, clients: int, arguments: argparse.Namespace) -> Outcome:
    """Compare the CPU seconds per request of two servers."""
    one, many = ([turn.cpu_seconds / arguments.requests for turn in way.turns[clients]] for way in (peer, ours))
    answers = "ragged answers" if arguments.ragged else "short answers"
    about = "new media" if arguments.questions == 1 else f"{arguments.questions} questions per medium"
    return timed(
        f"{ours.name}: requests per CPU second at {clients} clients, {answers}, {about}",
        "one request at a time, an Answerer for each",
        one,
        many,
        check="ids equal",
        goal=GOAL if clients == GOAL_CLIENTS and ours.name == "mllm serve" else None,
    )


def table_of(ways: Sequence[Way], arguments: argparse.Namespace) -> Table:
    """Tabulate what every server did at every number of clients."""
    table = Table(title=f"{arguments.requests} requests a turn, medians of {arguments.repeats} turns: milliseconds")
    for column in ("server", "clients", "requests/s", "CPU ms", "first p50", "first p99", "total p50", "total p99"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for clients in arguments.clients:
        for way in ways:
            turns = way.turns[clients]
            cells = [
                f"{statistics.median(arguments.requests / turn.wall_seconds for turn in turns):.1f}",
                f"{1000 * statistics.median(turn.cpu_seconds / arguments.requests for turn in turns):.1f}",
            ]
            for values in (
                [seconds for turn in turns for seconds in turn.firsts],
                [seconds for turn in turns for seconds in turn.totals],
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
    app, lock, decode = FastAPI(), threading.Lock(), processor.batch_decode

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
        ids: list[list[int]] = []
        answerer = Answerer(model, processor, Decoding(max_new_tokens=body["max_tokens"], ignores_end=True))

        def answer() -> None:
            with lock:
                # An answer tells no ids: they are taken where they are turned to text.
                processor.batch_decode = lambda rows, **how: (ids.extend(rows), decode(rows, **how))[1]
                model.generation_config.eos_token_id = None  # `generate` asks it where it is told of no end
                answerer.answer(text, **media, budget=body["budget"], on_text=pieces.put)
            pieces.put(None)

        threading.Thread(target=answer).start()
        while (piece := pieces.get()) is not None:
            yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n".encode()
        yield f"data: {json.dumps({'choices': [{'delta': {}, 'token_ids': ids[0]}]})}\n\n".encode()

    listener = socket.create_server(("127.0.0.1", 0))
    sys.stderr.write(f"serving at http://127.0.0.1:{listener.getsockname()[1]}/v1\n")
    sys.stderr.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", http="h11")).run(sockets=[listener])


def main() -> None:
    arguments = options(__doc__, 2, requests=64, clients=[1, 8, 32], ragged=0, questions=1, vllm=0)
    with tempfile.TemporaryDirectory() as folder:
        table, outcomes = compare(arguments, Path(folder))
    Console(width=140).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE_AT_A_TIME]:
        serve_one_at_a_time(sys.argv[2])
    else:
        main()
