"""Where fetching is allowed, only named hosts on the public network are asked, and each redirect is checked anew."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from mllm.serving.errors import RequestError
from mllm.serving.fetching import MAX_LOOKUPS, Fetcher, is_public

HOST = "images.example.org"
CONTENT = bytes(range(256)) * 40


class Site(http.server.BaseHTTPRequestHandler):
    """A site whose paths say what becomes of a request."""

    def do_GET(self) -> None:
        """Answer by the path."""
        self.server.seen.append((self.path, self.headers["host"]))  # type: ignore[attr-defined]
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("location", self.path.partition("?")[2])
            self.end_headers()
            return
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"a")
                self.wfile.flush()
                time.sleep(0.1)
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *values: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def fetcher(site: http.server.HTTPServer, addresses: Sequence[str] = ("127.0.0.1",), seconds: float = 5) -> Fetcher:
    """One for which the test's site is the public network."""
    return Fetcher(
        (HOST, "other.example.org"),
        seconds,
        look_up=lambda host, port: addresses,
        is_allowed=lambda address: address == "127.0.0.1",
        ports={"http": site.server_address[1], "https": site.server_address[1]},
    )


def test_a_file_of_a_named_host_is_read(site: http.server.HTTPServer) -> None:
    site.seen.clear()  # type: ignore[attr-defined]
    assert fetcher(site).fetch(f"http://{HOST}/a%20b.png?x=1", 100_000, "url") == CONTENT
    assert fetcher(site).fetch(f"http://{HOST}/to?/a.png", 100_000, "url") == CONTENT
    assert fetcher(site).fetch(f"http://{HOST}/to?http://other.example.org/a.png", 100_000, "url") == CONTENT
    port = site.server_address[1]
    assert site.seen[0] == ("/a%20b.png?x=1", f"{HOST}:{port}")  # type: ignore[attr-defined]
    assert site.seen[-1] == ("/a.png", f"other.example.org:{port}")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/none", "the host answered with status 404"),
        ("/to?http://127.0.0.1/a.png", "allowed are plain http and https addresses of images.example.org"),
        ("/to?http://third.example.org/a.png", "allowed are plain http and https addresses"),
        ("/to?file:///etc/passwd", "allowed are plain http and https addresses"),
        ("/to?//127.0.0.1/", "allowed are plain http and https addresses"),
        ("/to?/to?/to?/to?/a.png", "redirects more than 3 times"),
    ],
)
def test_what_a_host_answers_is_checked(site: http.server.HTTPServer, target: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        fetcher(site).fetch(f"http://{HOST}{target}", 100_000, "url")
    assert caught.value.status == 400


def test_a_file_is_read_within_its_size_and_time(site: http.server.HTTPServer) -> None:
    with pytest.raises(RequestError, match="the file is larger than 10,000 bytes"):
        fetcher(site).fetch(f"http://{HOST}/a.png", 10_000, "url")
    start = time.monotonic()
    with pytest.raises(RequestError, match="the file could not be fetched"):
        fetcher(site, seconds=1).fetch(f"http://{HOST}/slow", 10_000, "url")
    assert time.monotonic() - start < 3
    with pytest.raises(RequestError, match="could not be fetched"):  # it is no TLS that the site speaks
        fetcher(site).fetch(f"https://{HOST}/a.png", 10_000, "url")


def test_every_address_of_a_host_must_be_public_and_the_one_that_was_checked_is_asked(
    site: http.server.HTTPServer,
) -> None:
    site.seen.clear()  # type: ignore[attr-defined]
    for addresses in (["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], []):
        with pytest.raises(RequestError, match="the host is not one of the public network"):
            fetcher(site, addresses).fetch(f"http://{HOST}/a.png", 10_000, "url")
    assert site.seen == []  # type: ignore[attr-defined]
    looked_up = []

    def rebinding(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1" if len(looked_up) == 1 else "10.0.0.1"]

    ports = {"http": site.server_address[1]}
    rebound = Fetcher([HOST], look_up=rebinding, is_allowed=lambda address: address == "127.0.0.1", ports=ports)
    assert rebound.fetch(f"http://{HOST}/a.png", 100_000, "url") == CONTENT
    assert looked_up == [HOST]


def test_a_resolver_that_stalls_holds_nobody(site: http.server.HTTPServer) -> None:
    is_over = threading.Event()

    def stalling(host: str, port: int) -> list[str]:
        is_over.wait(30)
        return ["127.0.0.1"]

    stalled = Fetcher([HOST], 0.3, look_up=stalling)
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(MAX_LOOKUPS + 4) as threads:  # more than may wait for a resolver at once

            def fetch(number: int) -> str:
                with pytest.raises(RequestError, match="the file could not be fetched") as caught:
                    stalled.fetch(f"http://{HOST}/{number}.png", 10_000, "url")
                return caught.value.message

            assert len(list(threads.map(fetch, range(MAX_LOOKUPS + 4)))) == MAX_LOOKUPS + 4
        assert time.monotonic() - start < 10
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("resolver") <= MAX_LOOKUPS
    finally:
        is_over.set()
    assert fetcher(site).fetch(f"http://{HOST}/a.png", 100_000, "url") == CONTENT


def test_a_host_that_is_not_known_is_told_in_the_same_words() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    with pytest.raises(RequestError, match="the file could not be fetched"):
        Fetcher([HOST], look_up=unknown).fetch(f"http://{HOST}/a.png", 10_000, "url")


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}:80/a.png",
        f"http://user@{HOST}/a.png",
        f"http://{HOST}@127.0.0.1/a.png",
        f"http://127.0.0.1\\@{HOST}/a.png",
        f"http://{HOST}./a.png",
        f"http://x.{HOST}/a.png",
        f"http://{HOST}/a b.png",
        f"http://{HOST}/a\r\nhost: b",
        f"http://{HOST}/\u0000",
        f"http://{HOST}\u3002/a",
        f"ftp://{HOST}/a.png",
        f"http://{HOST}/" + "a" * 3000,
        "http:///a.png",
        "http://[::1]/a.png",
    ],
)
def test_an_address_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="allowed are plain http and https addresses"):
        Fetcher([HOST]).take_apart(url, "url")


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "Images.example.org", "a..b", "-a.org", "a.0x7f", "[::1]", ""]
)
def test_hosts_are_named_by_whole_names(host: str) -> None:
    with pytest.raises(ValueError, match="is no host name in lower case"):
        Fetcher([host])


def test_which_addresses_are_public() -> None:
    private = "127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 255.255.255.255 "
    private += "192.0.2.1 ::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:8.8.8.8 ::ffff:127.0.0.1 64:ff9b::7f00:1 "
    private += "64:ff9b::808:808 2002:7f00:1:: 2001:0:7f00:1:: ::127.0.0.1 240.0.0.1 198.18.0.1"
    assert [address for address in private.split() if is_public(address)] == []
    assert all(is_public(address) for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"))
