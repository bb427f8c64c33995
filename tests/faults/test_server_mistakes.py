"""A mistake inside a server fails the one request that it happens in, in words that give nothing away."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from toy_server import HTTP, NAME, Running, server, user, write_run

from mllm.utils.fail_points import VARIABLE

pytestmark = pytest.mark.slow
in_full_runs = pytest.mark.skipif("ALL_FAULTS" not in os.environ, reason="a server each: run by make test-faults")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("mistakes"), ("image",))


def ask(running: Running) -> httpx.Response:
    body = {"model": NAME, "messages": user("what is it?"), "max_tokens": 4, "temperature": 0}
    return HTTP.post(f"{running.url}/chat/completions", json=body, timeout=60)


def answer_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("place", [pytest.param("serve.prepare", marks=in_full_runs), "serve.answer"])
def test_one_request_fails_and_the_next_is_answered(run: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv(VARIABLE, f"{place}:raise@2")
    with server(run) as running:
        before, failed, after = ask(running), ask(running), ask(running)
        assert answer_of(before) == answer_of(after)
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "internal_error"
        assert not [word for word in ("Traceback", "injected", str(run.parent), ".py") if word in failed.text]
        assert any(f"injected at {place}" in line for line in running.lines)


@in_full_runs
def test_one_request_that_never_gets_ready_holds_up_no_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "serve.prepare:hang@1")
    with server(run) as running, ThreadPoolExecutor(1) as pool:
        body = {"model": NAME, "messages": user("what is it?")}
        stuck = pool.submit(HTTP.post, f"{running.url}/chat/completions", json=body, timeout=10)
        answer_of(ask(running))
        assert isinstance(stuck.exception(60), httpx.ReadTimeout)
        answer_of(ask(running))
