"""Turns what a data loader makes of an error in one of its processes back into that error.

torch puts the traceback of the process, as text, in front of the message, and raises the same type with all of it. Here
the message is what the error said, and the traceback is its cause.

Knows the texts of torch. Does not know what is loaded.
"""

import re
import traceback
from collections.abc import Iterator
from typing import Any

_CAUGHT = re.compile(r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\nOriginal Traceback")
_TRACEBACK = "Traceback (most recent call last):"
_GONE = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?:exited|is killed by signal: (?P<signal>\w+))"
)


def readable_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches of a data loader; an error in one of its processes is raised as that process raised it.

    Raises:
        ChildProcessError: a process ended without a word, as one does that the system takes memory back from.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            # An error and the frames it went through hold each other, and with them the loader; a loader that the
            # collector finds, instead of being let go of, waits five seconds for each of its processes.
            traceback.clear_frames(error.__traceback__)
            readable = _readable(error)
            try:
                if readable is None:
                    raise
                raise readable from error
            finally:
                del readable, batches
        yield batch


def _readable(error: Exception) -> Exception | None:
    text = str(error)
    if match := _CAUGHT.match(text):
        # Of errors that led to each other the last is the one that was raised; its message may quote others.
        last = text[text.rfind(_TRACEBACK) :]
        raised = re.search(rf"^(?:\w+\.)*{match['kind']}: ", last, re.MULTILINE)
        return type(error)(last[raised.end() :].strip()) if raised else None
    if match := _GONE.search(text):
        by = f" by {match['signal']}" if match["signal"] else ""
        return ChildProcessError(
            f"process {match['pids']}, which prepares batches, was ended{by} and could not say why; where that is for "
            "want of memory, data.num_workers, data.tokens_per_batch or data.limits may be lower"
        )
    return None
