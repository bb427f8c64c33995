"""Keeps Python's garbage collector from looking through very many objects that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let nothing look for cycles inside; reading a million rows would look through all of them again and again.

    Whatever is in no cycle is freed at once, as ever. A collector that was off before stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def leave_out_of_collections() -> None:
    """Let the collector never look again at what is there now, such as a model and the libraries it needs.

    With half a million such objects a full collection takes 0.4 seconds and more, during which a server answers nobody.
    """
    gc.collect()
    gc.freeze()
