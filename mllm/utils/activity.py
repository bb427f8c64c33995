"""Keeps what this process is doing right now, for whoever looks when it does nothing any more.

One note per process: the training writes down its steps, a process that reads data its samples. A thread that watches
reads it, and a stuck main thread cannot be asked. Knows nothing of what is done.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Activity:
    """Says what is done, with which samples, since when, and how many seconds longer than usual it may last."""

    what: str
    sample_ids: tuple[str, ...] = ()
    extra_seconds: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        shown = ", ".join(self.sample_ids[:MAX_SHOWN]) + (", ..." if len(self.sample_ids) > MAX_SHOWN else "")
        return f"{self.what}, samples {shown}" if self.sample_ids else self.what


MAX_SHOWN = 32
"""How many samples are named."""
_current = Activity("starting")


def note_activity(what: str, sample_ids: Sequence[str] = (), *, extra_seconds: float = 0.0) -> None:
    """Note that something begins.

    Args:
        extra_seconds: how much longer it may take than others before that is a sign of trouble; infinity for a thing
            of which nobody knows.
    """
    global _current
    _current = Activity(what, tuple(sample_ids), extra_seconds)


def current_activity() -> Activity:
    """Return what was noted last."""
    return _current
