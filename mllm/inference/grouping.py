"""How requests are shared out among passes: those about the same media together, and no more rows than allowed.

Knows keys and counts. Does not know samples or models.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def alike(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items of one key together, in the order they come."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def number_in_pass(most: int, num_rows: int, max_rows: int | None) -> int:
    """How many of things that make `num_rows` rows each go into one pass: at least one, and `most` without a limit."""
    return most if max_rows is None else max(min(most, max_rows // num_rows), 1)
