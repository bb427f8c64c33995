"""Shows bars of work that goes on before the first step, once it has taken some seconds.

Knows terminals. Does not know what is done.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

DELAY_SECONDS = 2.0
"""Shorter work shows no bar."""
Item = TypeVar("Item")


@contextmanager
def reporting(what: str, *, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield what is called with how much of a work is done and how much there is; a bar shows it."""
    with tqdm(desc=what, disable=not is_shown, delay=DELAY_SECONDS) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def counted(items: Sequence[Item], what: str, *, is_shown: bool) -> Iterable[Item]:
    """Pass items on, and show how many there were."""
    return tqdm(items, desc=what, disable=not is_shown, delay=DELAY_SECONDS)
