"""Computes the grids that compressors nest in each other: their sizes, and how many queries stand behind one.

Knows counts. Does not know torch, budgets as words, or what a feature means.
"""

from collections.abc import Sequence


def haar_grids(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the grids of one in Haar order, coarse first: halved in turn along rows and columns while both are even.

    24 x 24 gives 3 x 3, 3 x 6, 6 x 6, 6 x 12, 12 x 12, 12 x 24, 24 x 24. A grid with an odd side gives itself alone.
    """
    grids = [grid]
    rows, columns = grid
    while rows % 2 == 0 and columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
        grids += [(rows, 2 * columns), (rows, columns)]
    return grids[::-1]


def nesting_sizes(counts: Sequence[int], anchors: Sequence[int] | None) -> tuple[int, ...]:
    """Return the sizes of the pooled grid of a hybrid compressor, smallest first; 1 is always among them.

    Args:
        counts: the trained budgets.
        anchors: the sizes that are asked for; 16 and 64 as far as they are below the largest budget where it is None.
    """
    return tuple(sorted({1, *(anchors if anchors is not None else [size for size in (16, 64) if size < max(counts)])}))


def check_nesting(counts: Sequence[int], sizes: Sequence[int]) -> str:
    """Say what is wrong with trained counts that leave queries untrained which a count below them needs; else nothing.

    Args:
        counts: the trained budgets. sizes: of `nesting_sizes`.
    """
    most = max(counts)
    widest = max(range(1, most + 1), key=lambda count: num_queries(count, sizes))
    needed, trained = num_queries(widest, sizes), max(num_queries(count, sizes) for count in counts)
    if trained and trained >= needed:
        return ""
    add, takes = (widest, needed) if needed else (most + 1, 1)
    return (
        f"train {trained} queries behind anchors {list(sizes)}, and {add} tokens take {takes}; "
        f"add {add} to the budgets, or set other anchors"
    )


def num_queries(count: int, sizes: Sequence[int]) -> int:
    """Count how many of so many soft tokens are queries: those behind the largest grid that is not above the count."""
    return count - max(size for size in sizes if size <= count)
