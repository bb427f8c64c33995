"""Of the page's routes only those that it uses are reached, with uploads alone, by its own browser, with the key."""

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from mllm.page.gate import POLICY, Gate
from mllm.page.uploads import Uploads
from mllm.serving.errors import RequestError
from mllm.serving.guard import Guard
from mllm.serving.limits import RequestLimits
from mllm.serving.metrics import Metrics

KEY = "secret"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it was sent."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"image")
    (tmp_path / "other.png").write_bytes(b"not uploaded")
    (folder / "link.png").symlink_to(tmp_path / "other.png")
    return Uploads(str(folder), max_bytes=100)


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here:8000") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.fixture
def gate(uploads: Uploads) -> Gate:
    return Gate(echo, uploads, upload_bytes=60)


@pytest.mark.parametrize(
    "path",
    ["/page", "/page/", "/page/config", "/page/assets/index.js", "/page/gradio_api/queue/data?session_hash=x"],
)
def test_what_a_browser_needs_is_let_through_and_may_speak_to_this_server_alone(gate: Gate, path: str) -> None:
    answer = ask(gate, "GET", path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert "http" not in POLICY
    assert "*" not in POLICY


@pytest.mark.parametrize(
    "path",
    [
        "/page/gradio_api/proxy=http://127.0.0.1:1/",
        "/page/gradio_api/file=http://127.0.0.1:1/",
        "/page/gradio_api/file=/etc/passwd",
        "/page/gradio_api/file=/page/../etc/passwd",
        "/page/gradio_api/runs",
        "/page/gradio_api/openapi.json",
        "/page/monitoring",
        "/page/login",
    ],
)
def test_what_gradio_serves_beside_is_not_there(gate: Gate, path: str) -> None:
    answer = ask(gate, "GET", path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "there is no such route")


def test_files_are_served_if_they_were_uploaded(gate: Gate, uploads: Uploads) -> None:
    assert ask(gate, "GET", f"/page/gradio_api/file={uploads.folder}/a.png").status_code == 200
    for name in ("link.png", "../other.png", "%2e%2e/other.png"):
        assert ask(gate, "GET", f"/page/gradio_api/file={uploads.folder}/{name}").status_code == 404


@pytest.mark.parametrize(
    "path", ["run/answer", "api/answer", "call/answer", "stream/x", "queue/join/x", "component_server"]
)
def test_functions_are_called_by_the_pages_queue_alone(gate: Gate, path: str) -> None:
    assert ask(gate, "POST", f"/page/gradio_api/{path}", json={}).status_code == 404


def test_other_routes_are_none_of_the_gates(gate: Gate) -> None:
    answer = ask(gate, "POST", "/v1/chat/completions", content=b"anything")
    assert answer.content == b"anything"
    assert "content-security-policy" not in answer.headers
    assert ask(gate, "GET", "/pages/x").status_code == 200


JOIN = "/page/gradio_api/queue/join"


def test_an_event_names_uploads_and_reaches_gradio_as_it_was(gate: Gate, uploads: Uploads) -> None:
    event = {"data": ["what is it?", {"path": f"{uploads.folder}/a.png", "url": "http://here:8000/x"}], "fn_index": 1}
    answer = ask(gate, "POST", JOIN, content=json.dumps(event).encode())
    assert (answer.status_code, answer.json()) == (200, event)


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/x.png", "/etc/passwd", "a.png", 5, None, "\0"])
def test_an_event_that_names_anything_else_is_refused(gate: Gate, path: Any) -> None:
    answer = ask(gate, "POST", JOIN, json={"data": [[{"value": {"path": path}}]]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "a file is named that was not uploaded")


def test_events_are_json_of_a_bounded_size(gate: Gate) -> None:
    assert ask(gate, "POST", JOIN, content=b"{").json()["error"]["message"] == "the body is not JSON"
    assert ask(gate, "POST", JOIN, content=b"[" * 200_000).status_code == 400
    assert ask(gate, "POST", JOIN, content=b" " * (1 << 21)).status_code == 413


def test_pages_of_other_sites_cannot_press_its_buttons(gate: Gate) -> None:
    for origin, status in (("http://here:8000", 200), ("http://elsewhere", 403), ("null", 403)):
        assert ask(gate, "POST", JOIN, json={}, headers={"origin": origin}).status_code == status


def test_the_oldest_uploads_make_room_for_new_ones(gate: Gate, uploads: Uploads) -> None:
    folder = Path(uploads.folder)
    (folder / "link.png").unlink()
    for age, name in enumerate(("new", "middle", "old")):
        (folder / name).write_bytes(b"x" * 30)
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert ask(gate, "POST", "/page/gradio_api/upload", content=b"").status_code == 200
    assert {file.name for file in folder.iterdir()} == {"new", "a.png"}


def test_a_file_is_read_if_it_was_uploaded_and_is_still_there(uploads: Uploads, tmp_path: Path) -> None:
    assert uploads.read(None, "image") is None
    assert uploads.read({"path": f"{uploads.folder}/a.png"}, "image") == b"image"
    for value in ({"path": str(tmp_path / "other.png")}, {"path": f"{uploads.folder}/gone"}, {"url": "http://x"}, "a"):
        with pytest.raises(RequestError, match="the image is not there any more; choose the file again"):
            uploads.read(value, "image")


def test_a_browser_gives_the_key_as_a_password_and_on_the_page_alone() -> None:
    guard = Guard(echo, RequestLimits(), Metrics(), key=KEY)

    def status(path: str, scheme: str, word: str) -> int:
        return ask(guard, "GET", path, headers={"authorization": f"{scheme} {word}"}).status_code

    def basic(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    refused = ask(guard, "GET", "/page/")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic ")
    assert "the key as password" in refused.json()["error"]["message"]
    assert ask(guard, "GET", "/v1/models").headers["www-authenticate"] == "Bearer"
    assert status("/page/", "Basic", basic(f"anybody:{KEY}")) == status("/page", "Bearer", KEY) == 200
    wrong = [basic("anybody:wrong"), basic(KEY), basic("anybody:"), "***", ""]
    assert [status("/page/", "Basic", word) for word in wrong] == [401] * len(wrong)
    assert status("/v1/models", "Basic", basic(f"anybody:{KEY}")) == 401
    assert status("/pages", "Basic", basic(f"anybody:{KEY}")) == 401
