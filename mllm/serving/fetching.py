"""Reads a file from another machine, where a server allows it: from named hosts, and never from its own network.

One reader takes the address apart, and what it gives is what is connected to: the host is looked up once, every
address it has must be a public one, and the connection goes to that very address. A redirect is a new address and is
checked anew. Nothing here reads the environment for proxies.

Knows addresses and HTTP. Does not know media.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from mllm.serving.errors import RequestError, bad_request
from mllm.serving.fields import shown

MAX_URL_CHARS = 2048
MAX_REDIRECTS = 3
CHUNK_BYTES = 64 * 1024
MAX_LOOKUPS = 16
"""Threads that may wait for a resolver at once."""
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))+")
_PLAIN_URL = re.compile(r"[!#-;=?-\[\]_a-z~%]+")
_LOOKUPS = threading.BoundedSemaphore(MAX_LOOKUPS)
_PORTS = {"http": 80, "https": 443}
_TRANSLATED = [ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")]


@dataclass(frozen=True)
class Address:
    """Holds an address taken apart: nothing of it is read a second time."""

    scheme: str
    host: str
    target: str


def addresses_of(host: str, port: int) -> list[str]:
    """Look a host up."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def look_up_within(look_up: Callable[[str, int], Sequence[str]], host: str, port: int, seconds: float) -> Sequence[str]:
    """Look a host up on a thread of its own, since a resolver that stalls cannot be stopped.

    Raises:
        TimeoutError: it took longer, or too many others stall already.
        OSError: the host is not known.
    """
    end = time.monotonic() + seconds
    if not _LOOKUPS.acquire(timeout=seconds):
        raise TimeoutError
    answer: Future[Sequence[str]] = Future()

    def run() -> None:
        try:
            answer.set_result(look_up(host, port))
        except BaseException as error:
            answer.set_exception(error)
        finally:
            _LOOKUPS.release()

    threading.Thread(target=run, name="resolver", daemon=True).start()
    return answer.result(timeout=_left(end))


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public network.

    Addresses of version 6 that hold one of version 4 are not: they would be another way to write any of those.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        holds_other = ip.ipv4_mapped or ip.sixtofour or ip.teredo or any(ip in network for network in _TRANSLATED)
        if holds_other:
            return False
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True)
class Fetcher:
    """Reads files from named hosts.

    Args:
        hosts: names that may be asked, whole ones; redirects too must lead to one of them.
        seconds: longest time for one file, looking up and redirects included.
        look_up: a host and a port to its IP addresses.
        is_allowed: which IP addresses may be connected to.
        ports: by scheme.
    """

    hosts: Sequence[str]
    seconds: float = 10.0
    look_up: Callable[[str, int], Sequence[str]] = addresses_of
    is_allowed: Callable[[str], bool] = is_public
    ports: dict[str, int] | None = None

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST.fullmatch(host) or _is_number(host):
                raise ValueError(f"url_hosts: {host!r} is no host name in lower case, such as images.example.org")

    def fetch(self, url: str, max_bytes: int, where: str) -> bytes:
        """Read a file.

        Args:
            max_bytes: largest one.
            where: the key that holds the address, for messages.

        Raises:
            RequestError: 400, an address that is not allowed, or a file that cannot be had; what the network said is
                not told.
        """
        end = time.monotonic() + self.seconds
        for _ in range(MAX_REDIRECTS + 1):
            address = self.take_apart(url, where)
            try:
                content, location = self._ask(address, max_bytes, end, where)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise bad_request(f"{where}: the file could not be fetched", where) from error
            if location is None:
                return content
            url = urljoin(url, location)
        raise bad_request(f"{where}: the address redirects more than {MAX_REDIRECTS} times", where)

    def take_apart(self, url: str, where: str) -> Address:
        """Take an address apart, and refuse whatever two readers could read in two ways.

        Raises:
            RequestError: 400.
        """
        refused = bad_request(
            f"{where} is {shown(url)}; allowed are plain http and https addresses of {', '.join(self.hosts)}", where
        )
        if len(url) > MAX_URL_CHARS or not _PLAIN_URL.fullmatch(url.lower()):
            raise refused
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise refused from None
        host = parts.netloc.lower()
        if parts.scheme not in _PORTS or port is not None or host not in self.hosts:
            raise refused
        target = parts.path or "/"
        return Address(parts.scheme, host, f"{target}?{parts.query}" if parts.query else target)

    def _ask(self, address: Address, max_bytes: int, end: float, where: str) -> tuple[bytes, str | None]:
        """Read the file, or where it is now."""
        port = (self.ports or _PORTS)[address.scheme]
        addresses = look_up_within(self.look_up, address.host, port, _left(end))
        if not addresses or not all(self.is_allowed(ip) for ip in addresses):
            raise bad_request(f"{where}: the host is not one of the public network", where)
        connection = _Pinned(address, addresses[0], port, _left(end))
        try:
            connection.request("GET", address.target, headers={"Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return b"", response.getheader("Location") or ""
            if response.status != 200:
                raise bad_request(f"{where}: the host answered with status {response.status}", where)
            parts, size = [], 0
            while part := response.read1(CHUNK_BYTES):
                size += len(part)
                if size > max_bytes:
                    raise bad_request(f"{where}: the file is larger than {max_bytes:,} bytes", where)
                parts.append(part)
                if connection.sock is not None:
                    connection.sock.settimeout(_left(end))
                elif time.monotonic() > end:
                    raise TimeoutError
            return b"".join(parts), None
        finally:
            connection.close()


class _Pinned(http.client.HTTPConnection):
    """Connects to one IP address, and asks for the host by name."""

    def __init__(self, address: Address, ip: str, port: int, seconds: float) -> None:
        super().__init__(address.host, port, timeout=seconds)
        self._address, self._ip = address, ip

    def connect(self) -> None:
        """Connect to the address that was checked, and to no other."""
        self.sock = socket.create_connection((self._ip, self.port), self.timeout)
        if self._address.scheme == "https":
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self._address.host)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_number(host: str) -> bool:
    """Tell whether a name ends in a number, which some resolvers take for an IP address."""
    return re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]) is not None


__all__ = ["Address", "Fetcher", "RequestError", "addresses_of", "is_public"]
