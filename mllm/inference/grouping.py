"""Groups requests into batches: those about the same media together, and no more rows than allowed.

Knows keys and counts. Does not know samples or models.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Puts items of one key together, in the order they come."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def number_per_batch(most: int, num_rows: int, max_rows: int | None) -> int:
    """Counts how many things of `num_rows` rows each go into one batch: at least one, and `most` without a limit."""
    return most if max_rows is None else max(min(most, max_rows // num_rows), 1)
