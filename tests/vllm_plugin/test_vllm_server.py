"""vLLM's own HTTP server finds the plug-in and answers an export as `Answerer` does, at the budget of a request."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from engine_runs import MAX_NEW_TOKENS, answerer_of, needs_vllm, write_export
from free_ports import free_port
from toy_server import ROOT, part, user

from mllm.vllm_plugin.engine_options import ENVIRONMENT

SECONDS = 900
FLAGS = ("--dtype", "float32", "--block-size", "32", "--trust-request-mm-kwargs")
"""Those that docs/serving.md prints."""
pytestmark = needs_vllm


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with images, audio and lips."""
    return write_export(tmp_path_factory.mktemp("vllm_server"))


@pytest.fixture(scope="module")
def client(exported: Path) -> Iterator[httpx.Client]:
    """A client of the server, which runs in a process of its own."""
    port = free_port()
    words = ["--model", str(exported), "--served-model-name", "toy", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    module = "vllm.entrypoints.openai.api_server"
    log = exported.parent / "log.txt"
    with log.open("w") as lines:
        command = [sys.executable, "-m", module, *words, *FLAGS, "--max-model-len", "1024"]
        process = subprocess.Popen(command, env=environment, stdout=lines, stderr=lines)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_for(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def wait_for(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


def ask(client: httpx.Client, budget: str, *parts: Any) -> httpx.Response:
    """Send one request."""
    body = {"model": "toy", "messages": user(*parts), "max_tokens": MAX_NEW_TOKENS, "temperature": 0}
    return client.post("/v1/chat/completions", json={**body, "mm_processor_kwargs": {"budget": budget}})


def test_answers_at_every_budget_are_those_of_the_answerer(client: httpx.Client, exported: Path) -> None:
    answerer = answerer_of(exported)
    files = tiny.write_media(exported.parent, seed=3)
    budgets = {"image": ("image=64", "image=3", "image=1"), "audio": ("audio=/4", "audio=/8")}
    for medium, of_medium in budgets.items():
        content = (exported.parent / files[medium]).read_bytes()
        for budget in of_medium:
            answer = ask(client, budget, part(medium, content), "what is it?")
            assert answer.status_code == 200, answer.text
            expected = answerer.answer("what is it?", **{medium: content}, budget=budget)
            assert answer.json()["choices"][0]["message"]["content"].strip() == expected.text, budget


def test_what_no_budget_gives_is_refused_with_what_to_write(client: httpx.Client, exported: Path) -> None:
    content = (exported.parent / tiny.write_media(exported.parent, seed=4)["image"]).read_bytes()
    for budget, message in (("image=1000", "1000"), ("total<=20", "total")):
        answer = ask(client, budget, part("image", content), "what is it?")
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
