"""What strangers send does the server no harm: nothing is read or fetched for them, and what is refused says no more
than it must."""

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from toy_server import HTTP, NAME, Running, part, server, user

KEY = "a-key-öf-ours"
HEADERS = {"authorization": f"Bearer {KEY}".encode()}
# A path of this machine, an address in memory, or a stack.
LEAKS = re.compile(rb"/(work|root|home|usr|tmp|proc|opt)/|0x[0-9a-f]{6}|Traceback|site-packages|\.py\b")
Files = list[dict[str, bytes]]


@pytest.fixture(scope="module")
def guarded(run: Path) -> Iterator[Running]:
    """A server with a key, small limits and one decoder."""
    words = [
        *("--requests.max_body_bytes", "1000000", "--requests.max_bytes_in_flight", "3000000"),
        *("--requests.read_seconds", "1.5", "--requests.max_requests", "3", "--requests.max_new_tokens", "64"),
        *("--num_decoders", "1", "--measure_budgets", "false", "--max_budget", "image=16"),
        *("--limits.deadline_seconds", "5"),
    ]
    with server(run, *words, key=KEY) as running:
        yield running


@contextmanager
def connected(running: Running, seconds: float = 10) -> Iterator[socket.socket]:
    """A plain connection, for what no client library sends."""
    with socket.create_connection(("127.0.0.1", running.port), seconds) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    while True:
        try:
            part = connection.recv(65_536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def post(running: Running, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **HEADERS, **options.pop("headers", {})}
    # A decoder that has to be started anew first loads its libraries, which takes long where others share the machine.
    return HTTP.post(f"{running.url}/chat/completions", content=content, headers=headers, timeout=120, **options)


def body_of(*parts: Any, **changes: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": user(*parts), **changes}


def is_well(running: Running) -> None:
    """The next request is answered, within two seconds."""
    start = time.monotonic()
    answer = post(running, body_of("what?", max_tokens=2))
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - start < 2


def test_every_route_but_health_needs_the_key(guarded: Running) -> None:
    routes = [("GET", f"/v1/{name}") for name in ("models", f"models/{NAME}", "budgets", "nothing")]
    routes += [
        ("GET", "/metrics"),
        ("GET", "/"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/audio/transcriptions"),
    ]
    wrong = [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer x"},
        {"authorization": f"Basic {KEY}".encode()},
    ]
    wrong += [{"authorization": f"Bearer {KEY}x".encode()}, {"authorization": KEY.encode()}, {"x-api-key": "x"}]
    for method, route in routes:
        for headers in wrong:
            answer = HTTP.request(method, guarded.address + route, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (route, headers)
            assert answer.json()["error"]["type"] == "authentication_error"
        assert HTTP.request(method, guarded.address + route, headers=HEADERS).status_code != 401
    assert HTTP.get(f"{guarded.address}/health").status_code == 200
    for name in ("docs", "redoc", "openapi.json"):
        assert HTTP.get(f"{guarded.address}/{name}", headers=HEADERS).status_code == 404


def test_bodies_are_refused_by_their_size_type_and_nesting(guarded: Running) -> None:
    large = b'{"a": "' + b"x" * 1_000_000 + b'"}'
    stated = post(guarded, large)
    assert (stated.status_code, stated.json()["error"]["code"]) == (413, "too_large")
    pieces = HTTP.post(
        f"{guarded.url}/chat/completions",
        content=(large[start : start + 50_000] for start in range(0, len(large), 50_000)),
        headers={"content-type": "application/json", **HEADERS},
    )
    assert pieces.status_code == 413
    nested = b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert "nested deeper than 32" in post(guarded, nested).json()["error"]["message"]
    other = post(guarded, body_of("a"), headers={"content-type": "text/plain"})
    assert (other.status_code, other.json()["error"]["message"]) == (415, "content-type must be application/json")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert "there are 1000 media" in post(guarded, body_of(*[image] * 1000)).json()["error"]["message"]
    is_well(guarded)


def test_large_heads_and_what_is_no_http_end_the_connection(guarded: Running) -> None:
    for sent in (
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x: a\r\n" * 20_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ):
        with connected(guarded) as connection:
            try:
                connection.sendall(sent)
                answer = everything(connection)
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
        assert answer[9:12] in (b"", b"400", b"401", b"431"), answer[:80]
        assert not LEAKS.search(answer)
    is_well(guarded)


def test_slow_senders_are_cut_off(guarded: Running) -> None:
    key = b"authorization: Bearer " + KEY.encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" + key
    start = time.monotonic()
    with connected(guarded) as silent, connected(guarded) as slow_head, connected(guarded) as slow_body:
        slow_head.sendall(b"GET /health HTTP/1.1\r\nhost:")
        slow_body.sendall(head + b"\r\ncontent-length: 500\r\n\r\n{")

        def drip() -> None:
            for _ in range(30):
                time.sleep(0.1)
                for connection, piece in ((slow_head, b"a"), (slow_body, b" ")):
                    with suppress(OSError):
                        connection.sendall(piece)

        thread = threading.Thread(target=drip)
        thread.start()
        assert b" 408 " in slow_body.recv(65_536)
        assert everything(silent) == b""
        assert everything(slow_head) == b""
        assert time.monotonic() - start < 5
        thread.join()
    is_well(guarded)


def test_files_that_are_none_are_refused_one_by_one(served: Running, files: Files) -> None:
    """On the server whose limits are the usual ones, so that no deadline comes before the file's own fault."""
    bomb = (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + bytes(40)
    )
    for medium, content, message in (
        ("image", b"hello", "unsupported"),
        ("image", bomb, "limit|corrupt"),
        ("image", files[0]["image"][:200], "corrupt"),
        ("audio", files[0]["audio"][:20], "corrupt|empty"),
        ("video", files[0]["video"][:-2000], "corrupt"),
        ("audio", files[0]["image"], "neither an audio nor a video file"),
    ):
        answer = post(served, body_of(part(medium, content), "what?"))
        assert answer.status_code == 400, answer.text
        assert re.search(message, answer.json()["error"]["message"]), answer.text
        assert answer.json()["error"]["param"] == "messages[0].content[0]"
        assert not LEAKS.search(answer.content)
    is_well(served)


def test_a_request_may_lower_the_cap_and_never_raise_it(guarded: Running, files: Files) -> None:
    image = part("image", files[0]["image"])
    assert post(guarded, body_of(image, "what?", budget="image=9")).json()["usage"]["budget"] == "image=9"
    assert post(guarded, body_of(image, "what?")).json()["usage"]["budget"] == "image=16"
    chosen = part("image", files[0]["image"], detail="auto")  # by the router that lies beside the model
    assert post(guarded, body_of(chosen, "what?")).json()["usage"]["budget"] in ("image=16", "image=4", "image=1")
    refused = post(guarded, body_of(image, "what?", budget="image=64"))
    assert refused.status_code == 400
    assert "this server allows at most image=16, so 16, 4, 1" in refused.json()["error"]["message"]
    rows = HTTP.get(f"{guarded.url}/budgets", headers=HEADERS).json()
    assert rows["max_budget"] == "image=16"
    assert [row["budget"] for row in rows["data"] if row["type"] == "image"] == ["image=16", "image=4", "image=1"]


def long_request(running: Running, *, stream: bool) -> socket.socket:
    """A connection on which a request with many long answers has been sent."""
    body = json.dumps(body_of("go on and on", n=8, stream=stream)).encode()
    connection = socket.create_connection(("127.0.0.1", running.port), 10)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nauthorization: Bearer {KEY}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def gauges(running: Running) -> dict[str, float]:
    lines = HTTP.get(f"{running.address}/metrics", headers=HEADERS).text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("mllm_") and "{" not in line}


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_client_that_leaves_has_asked_for_ends_within_a_second(guarded: Running, stream: bool) -> None:
    for _ in range(4):
        with long_request(guarded, stream=stream):
            deadline = time.monotonic() + 10
            while gauges(guarded)["mllm_running_answers"] < 8 and time.monotonic() < deadline:
                time.sleep(0.01)
        start = time.monotonic()
        while (counts := gauges(guarded))["mllm_running_answers"] + counts["mllm_open_requests"] > 0:
            assert time.monotonic() - start < 1
            time.sleep(0.02)
    is_well(guarded)


def test_a_full_queue_says_when_to_come_back(guarded: Running) -> None:
    waiting = [long_request(guarded, stream=True) for _ in range(3)]
    try:
        deadline = time.monotonic() + 10
        while gauges(guarded)["mllm_open_requests"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        refused = post(guarded, body_of("what?"))
        assert time.monotonic() - start < 2
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert HTTP.get(f"{guarded.address}/health").status_code == 200
    finally:
        for connection in waiting:
            connection.close()
    time.sleep(1)
    is_well(guarded)


def mutated(body: Any, rng: random.Random) -> Any:
    """A body with one thing wrong, anywhere in it."""
    odd = [
        None,
        True,
        -1,
        10**30,
        1e308,
        "",
        "x" * 5_000,
        [],
        {},
        [[]],
        {"a": {}},
        "\ud83d\ude00",
        "\u0000",
        "data:,",
        [None],
    ]
    if isinstance(body, dict) and body and rng.random() < 0.85:
        key = rng.choice(list(body))
        kind = rng.random()
        if kind < 0.1:
            return {other: value for other, value in body.items() if other != key}
        if kind < 0.2:
            return {**body, rng.choice(["", "a", key.upper(), f"{key} ", "__class__"]): rng.choice(odd)}
        return {**body, key: mutated(body[key], rng)}
    if isinstance(body, list) and body and rng.random() < 0.85:
        index = rng.randrange(len(body))
        if rng.random() < 0.1:
            return body * rng.choice([0, 2, 40])
        return [mutated(item, rng) if number == index else item for number, item in enumerate(body)]
    if isinstance(body, str) and len(body) > 40 and rng.random() < 0.7:
        index = rng.randrange(len(body))
        return body[:index] + rng.choice(["", "\n", "%", "é", "AAAA", ";", ","]) + body[index + rng.randrange(9) :]
    return rng.choice(odd)


def malformed(number: int, files: Files) -> bytes:
    """One of many bodies that are wrong, the same for the same number; few are right by chance."""
    rng = random.Random(number)
    parts = [part(medium, rng.choice(files)[medium]) for medium in ("image", "audio") if rng.random() < 0.6]
    body: Any = body_of(*parts, "what?", max_tokens=2, budget="image=4" if len(parts) == 2 else "", temperature=0.5)
    body |= {"stream": rng.random() < 0.3, "stop": ["a"], "n": 1, "seed": 3, "media_resolution": "low"}
    for _ in range(rng.randrange(1, 4)):
        body = mutated(body, rng)
    content = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        index = rng.randrange(len(content) + 1)
        content = content[:index] + rng.randbytes(rng.randrange(4)) + content[index + rng.randrange(20) :]
    return content


@pytest.mark.parametrize(
    "numbers", [range(100), pytest.param(range(100, 1_000), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_malformed_requests_are_never_our_mistake(guarded: Running, files: Files, numbers: range) -> None:
    statuses = []
    with httpx.Client(headers={"content-type": "application/json", **HEADERS}, timeout=30) as client:
        for number in numbers:
            answer = client.post(f"{guarded.url}/chat/completions", content=malformed(number, files))
            assert answer.status_code in (200, 400, 404, 413), (number, answer.text)
            assert answer.status_code == 200 or not LEAKS.search(answer.content), (number, answer.text)
            statuses.append(answer.status_code)
    assert statuses.count(400) > 0.6 * len(statuses)
    is_well(guarded)


class Canary:
    """Listens on loopback, where nobody may come, and counts who does."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.visits: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.visits.append(connection.recv(500))

    def close(self) -> None:
        self._socket.close()


def tricks(port: int, file: Path) -> list[str]:
    """Addresses that mean this machine, or one of its files, to somebody."""
    hosts = [
        *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433"),
        *("0x7f000001", "0x7f.0.0.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "127.000.000.001", "127.0.0.2"),
        *(
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[0:0:0:0:0:0:0:1]",
            "[::127.0.0.1]",
            "[fe80::1%25lo]",
        ),
        *(
            "[64:ff9b::7f00:1]",
            "①②⑦.⓪.⓪.①",
            "127。0。0。1",
            "localhost%00.example.org",
            "localtest.me",
            "127.0.0.1.nip.io",
        ),
        *("allowed.example.org@127.0.0.1", "allowed.example.org:80@127.0.0.1", "127.0.0.1#@allowed.example.org"),
        *("127.0.0.1\\@allowed.example.org", "allowed.example.org\\@127.0.0.1", "127.0.0.1%23@allowed.example.org"),
        *(
            "allowed.example.org%40127.0.0.1",
            "allowed.example.org.127.0.0.1",
            "127.0.0.1 allowed.example.org",
            "[::1]%25",
        ),
    ]
    urls = [f"http://{host}:{port}/a.png" for host in hosts]
    urls += [f"{scheme}127.0.0.1:{port}/a.png" for scheme in (
        "HTTP://", "http:/", "http:", "http:\\\\", "http:///", " http://", "\thttp://", "ht\ntp://", "//", "\\\\", "https://",
        "ftp://", "gopher://", "dict://", "ws://", "tcp://", "ldap://", "jar:http://", "view-source:http://", "blob:http://",
        "http+unix://", "concat:http://", "hls+http://", "subfile,,start,0,end,9,,:http://", "url:http://", "feed://",
    )]  # fmt: skip
    path = str(file)
    urls += [
        f"file://{path}",
        f"file:{path}",
        f"FILE://{path}",
        f"file://localhost{path}",
        path,
        f"..{path}",
        f"~{path}",
    ]
    urls += [
        f"file:///{'..%2f' * 12}{path[1:]}",
        f"file:///{'../' * 12}{path[1:]}",
        "file:///proc/self/environ",
        "file:///etc/passwd",
        "file:///dev/zero",
    ]
    urls += [
        "/dev/stdin",
        "C:\\a.png",
        "data:text/uri-list;base64,aHR0cDovLzEyNy4wLjAuMQ==",
        f"data:image/png;http://127.0.0.1:{port}/,",
    ]
    return urls


@pytest.fixture
def canary() -> Iterator[Canary]:
    listener = Canary()
    yield listener
    listener.close()


def sent_tricks(running: Running, canary: Canary, folder: Path) -> None:
    """Every trick is refused as the client's mistake, and nobody comes by the canary."""
    secret = folder / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\n" + b"secret" * 9)
    urls = tricks(canary.port, secret)
    assert len(urls) >= 80
    for number, url in enumerate(urls):
        medium = ("image", "audio", "video")[number % 3]
        medium = "image" if url.startswith("data:") else medium
        answer = post(running, body_of({"type": f"{medium}_url", f"{medium}_url": {"url": url}}, "what?"))
        assert answer.status_code == 400, (url, answer.text)
        assert b"secret" * 2 not in answer.content
    assert canary.visits == []


def test_no_address_and_no_path_is_read_unless_the_server_allows_it(
    guarded: Running, canary: Canary, tmp_path: Path
) -> None:
    sent_tricks(guarded, canary, tmp_path)
    is_well(guarded)


def test_with_hosts_and_a_folder_allowed_nothing_else_is_read(
    served: Running, media_root: Path, canary: Canary
) -> None:
    sent_tricks(served, canary, media_root.parent)
    for name, status in (
        ("an%20image.png", 200),
        ("link.png", 400),
        ("../secret.png", 400),
        ("%2e%2e/secret.png", 400),
    ):
        body = body_of({"type": "image_url", "image_url": {"url": f"file:///{name}"}}, "what?", max_tokens=2)
        assert post(served, body).status_code == status, name
    assert canary.visits == []
