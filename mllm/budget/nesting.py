"""The maps that compressors nest in each other on a grid: their sizes, and how many queries stand behind one.

Knows counts and the keys that name them. Does not know torch, budgets as words, or what a feature means.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def haar_grids(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The maps of a grid in Haar order, coarse first: halved in turn along rows and columns while both are even.

    24 x 24 gives 3 x 3, 3 x 6, 6 x 6, 6 x 12, 12 x 12, 12 x 24, 24 x 24. A grid with an odd side gives itself alone.
    """
    grids = [grid]
    rows, columns = grid
    while rows % 2 == 0 and columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
        grids += [(rows, 2 * columns), (rows, columns)]
    return grids[::-1]


def hybrid_sizes(settings: Mapping[str, Any], key: str = "media.image") -> tuple[tuple[int, ...], int]:
    """The sizes of the pooled map of a hybrid compressor, smallest first, and the largest count.

    Args:
        settings: the `media.image` block. `anchors`, by default 16 and 64 as far as they are below the largest budget;
            one anchor is always among the sizes.
        key: for messages.

    Raises:
        ValueError: sizes that no budget reaches, or counts up to the largest that need queries no budget trains.
    """
    asked = settings["budgets"]
    if isinstance(asked, Mapping):
        asked = range(asked["start"], asked["stop"] + 1, asked["step"])
    counts, given = [int(count) for count in asked], settings.get("anchors")
    most = max(counts)
    sizes = tuple(sorted({1, *(given if given is not None else [size for size in (16, 64) if size < most])}))
    if sizes[0] < 1 or sizes[-1] > most:
        raise ValueError(f"{key}.anchors is {given}; allowed are counts 1..{most}, the largest budget")
    if settings.get("num_queries"):
        raise ValueError(f"{key}.num_queries follows from budgets and anchors under compressor 'hybrid'; leave it out")
    widest = max(range(1, most + 1), key=lambda count: num_queries(count, sizes))
    needed, trained = num_queries(widest, sizes), max(num_queries(count, sizes) for count in counts)
    if not trained or trained < needed:
        add, takes = (widest, needed) if needed else (most + 1, 1)
        raise ValueError(
            f"{key}.budgets train {trained} queries behind anchors {list(sizes)}, and {add} tokens take {takes}; "
            f"add {add} to the budgets, or set other anchors"
        )
    return sizes, most


def num_queries(count: int, sizes: Sequence[int]) -> int:
    """How many of so many soft tokens are queries: those behind the largest map that is not above the count."""
    return count - max(size for size in sizes if size <= count)
