"""Reads a request's media: bytes in the request, and files or addresses only where the server allows them.

Knows URLs, base64 and rules. Does not decode.
"""

import base64
import binascii
from dataclasses import dataclass, field
from urllib.parse import unquote

from mllm.media import MediaError, MediaLimits, resolve_media
from mllm.media.limits import open_media
from mllm.serving.errors import RequestError, bad_request, refusal_of
from mllm.serving.fetching import Fetcher
from mllm.serving.fields import shown

MAIN_TYPES = {"image": ("image",), "audio": ("audio", "video"), "video": ("video", "image")}
"""What a data URL may say it is, by medium: a video has audio, and an animation is a video."""
_ANY_TYPE = ("", "application")


@dataclass(frozen=True)
class SourceRules:
    """Says which sources are read beside data URLs; none by default.

    Args:
        fetcher: reads http and https addresses; None refuses them.
        media_root: folder whose files `file://` addresses may name; None refuses them.
        limits: of which the bytes count here.
    """

    fetcher: Fetcher | None = None
    media_root: str | None = None
    limits: MediaLimits = field(default_factory=MediaLimits)

    def max_bytes(self, medium: str) -> int:
        """Return the largest file of a medium."""
        return getattr(self.limits, f"{medium}_bytes")

    def read(self, url: str, medium: str, where: str) -> bytes:
        """Read what an address names.

        Args:
            where: the key that holds the address, for messages.

        Raises:
            RequestError: 400, an address that is not allowed or cannot be read, with what is allowed.
        """
        if url.startswith("data:"):
            content = _read_data(url, medium, where)
        elif url.startswith("file:") and self.media_root is not None:
            content = self._read_file(url, medium, where)
        elif url.startswith(("http://", "https://")) and self.fetcher is not None:
            content = self.fetcher.fetch(url, self.max_bytes(medium), where)
        else:
            raise bad_request(f"{where} is {shown(url)}; allowed: {self._allowed()}", where)
        self.check_size(content, medium, where)
        return content

    def check_size(self, content: bytes, medium: str, where: str) -> None:
        """Refuse a file that is empty or too large.

        Raises:
            RequestError: 400.
        """
        if not content:
            raise bad_request(f"{where} holds no bytes", where)
        if len(content) > self.max_bytes(medium):
            raise bad_request(
                f"{where} holds {len(content):,} bytes; a file of {medium} has at most {self.max_bytes(medium):,}",
                where,
            )

    def _allowed(self) -> str:
        names = ["data URLs (data:...;base64,...)"]
        names += [] if self.fetcher is None else [f"http and https addresses of {', '.join(self.fetcher.hosts)}"]
        names += [] if self.media_root is None else ["file:// addresses under the server's media root"]
        return " and ".join(names) + ("" if len(names) > 1 else "; nothing is fetched and no path is opened")

    def _read_file(self, url: str, medium: str, where: str) -> bytes:
        assert self.media_root is not None
        if not url.startswith("file:///"):
            raise bad_request(f"{where} is {shown(url)}; write file:/// and the path under the media root", where)
        try:
            path = resolve_media(self.media_root, unquote(url.removeprefix("file:///"), errors="strict"))
            with open_media(path, self.max_bytes(medium)) as file:
                return file.read()
        except UnicodeDecodeError:
            raise bad_request(f"{where} is not UTF-8", where) from None
        except MediaError as error:
            raise refusal_of(error, where) from error


def read_base64(text: str, where: str) -> bytes:
    """Read base64, of which no character is left out.

    Raises:
        RequestError: 400.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{where} is not base64", where) from None


def _read_data(url: str, medium: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    words = head.removeprefix("data:").split(";")
    if not comma or words[-1] != "base64":
        raise bad_request(f"{where} is {shown(url)}; a data URL is written data:TYPE;base64,...", where)
    main = words[0].partition("/")[0].lower()
    if main not in (*MAIN_TYPES[medium], *_ANY_TYPE):
        allowed = ", ".join(f"{kind}/..." for kind in MAIN_TYPES[medium])
        raise bad_request(f"{where} is of the type {shown(words[0])}; allowed: {allowed}", where)
    return read_base64(body, where)


__all__ = ["RequestError", "SourceRules", "read_base64"]
