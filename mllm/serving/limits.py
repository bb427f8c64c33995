"""Holds what a server refuses and how it puts answers together: numbers alone, as its options have them.

Knows numbers. Does not know HTTP, requests or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Says how many requests there may be, and how large they may be.

    Raises:
        ValueError: a limit that is not above 0.
    """

    max_requests: int = 64
    """Requests that are open at once; more are told to come back (429)."""
    max_body_bytes: int = 64 * 2**20
    """Largest body of a request, in bytes."""
    max_bytes_in_flight: int = 256 * 2**20
    """Most bytes of the bodies of all requests together; more are told to come back (503)."""
    max_header_bytes: int = 16 * 2**10
    """Largest head of a request, in bytes."""
    read_seconds: float = 30.0
    """Seconds that a client has to send its head, and again to send its body."""
    send_seconds: float = 30.0
    """Seconds that a client has to take a piece of its answer."""
    max_media: int = 16
    """Most images, audio clips and videos of one request."""
    max_choices: int = 8
    """Most answers to one request (n)."""
    max_new_tokens: int = 256
    """An answer ends there at the latest; requests may ask for less."""
    max_prompt_tokens: int = 32_768
    """Longest prompt, soft tokens included; what the LLM can read counts too."""
    repetition_tokens: int = 128
    """An answer whose last so many tokens are one short stretch again and again ends there, which the answer says; 0
    never looks."""

    def __post_init__(self) -> None:
        _check(self, "requests", may_be_zero=("repetition_tokens",))


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Says how answers are written together.

    Raises:
        ValueError: a number that is not above 0.
    """

    max_rows: int = 32
    """Most answers that are written at once."""
    max_tokens: int = 65_536
    """Most rows times tokens of the longest prompt of a batch, so that its padding counts."""
    steps_before_joining: int = 16
    """A batch is interrupted for answers that wait once it has written so many tokens of each."""
    wait_seconds: float = 0.02
    """Seconds that an idle model waits for requests that are just being read, to answer them together."""

    def __post_init__(self) -> None:
        _check(self, "batching", may_be_zero=("wait_seconds",))


def _check(limits: Any, key: str, *, may_be_zero: Sequence[str]) -> None:
    """Refuse numbers that are too small.

    Raises:
        ValueError: it is named as it is typed.
    """
    for name in (limit.name for limit in fields(limits)):
        value = getattr(limits, name)
        if value < 0 or (value == 0 and name not in may_be_zero):
            raise ValueError(f"{key}.{name} must be above 0, got {value!r}")
