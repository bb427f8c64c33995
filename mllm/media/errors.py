"""Defines the one error of everything that reads a media file.

Knows nothing about formats, limits or decoders.
"""

from typing import Literal, get_args

ErrorKind = Literal["missing", "refused", "unsupported", "corrupt", "empty", "limit", "deadline", "mismatch"]
"""What went wrong, for programs.

missing: no such file.  refused: not a regular file, or outside the declared root.
unsupported: a format, codec or pixel layout that is not read.  corrupt: the decoder gave up or the content contradicts
the header.  empty: no bytes, frames or samples.  limit: above a `MediaLimits` value.  deadline: decoding took too long.
mismatch: audio and video of one clip are not equally long.
"""
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)


class MediaError(ValueError):
    """Says that a media file cannot be used, and why.

    A `ValueError`, because a user's file caused it; it survives pickling, so data loader workers can hand it on.
    `reason` is a sentence of this package. What a decoder said stands only in `__cause__`, since decoder messages may
    hold addresses and pieces of the file, which must not reach a client.

    Args:
        kind: one of `ERROR_KINDS`.
        path: the file, as the caller named it.
        reason: what is wrong, with the limit where one was passed.
        limit: which length was passed, by the name of its limit; None for everything else.
    """

    def __init__(self, kind: ErrorKind, path: object, reason: str, *, limit: str | None = None) -> None:
        assert kind in ERROR_KINDS, kind
        super().__init__(kind, str(path), reason)
        self.kind = kind
        self.path = str(path)
        self.reason = reason
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.kind})"


def too_many_bytes(path: str, max_bytes: int, key: str | None) -> MediaError:
    """Return the refusal of a file above `max_bytes`; `key` is the name of the limit that says so, if one does."""
    setting = "" if key is None else f" (limits.{key})"
    return MediaError("limit", path, f"the file is larger than {max_bytes} bytes{setting}")
