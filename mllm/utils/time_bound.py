"""Ends Python code of other people that runs too long, such as the loops of a chat template.

Knows the lines of code that this thread runs. Does not know what they do.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TooSlowError(ValueError):
    """Says that code of other people took longer than it may."""


@contextmanager
def at_most(seconds: float, filename: str, what: str) -> Iterator[None]:
    """End code inside the block that still runs after so many seconds.

    The interpreter asks before each of its lines, in this thread alone: unlike a timer it needs no second thread and
    no signal, which a server's threads could not use, and cannot come too late. A debugger waits outside of the block.

    Args:
        filename: what the code was compiled under; the code that it calls is not asked, and so must end by itself.
        what: names it in the error.

    Raises:
        TooSlowError: it took longer.
    """
    end = time.monotonic() + seconds

    def before_line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TooSlowError(f"{what} takes longer than {seconds:g} seconds")
        return before_line

    def before_call(frame: FrameType, event: str, argument: Any) -> Any:
        return before_line if frame.f_code.co_filename == filename else None

    outside = sys.gettrace()
    sys.settrace(before_call)
    try:
        yield
    finally:
        sys.settrace(outside)
