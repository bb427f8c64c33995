"""Lays the soft tokens of an image out in rows, each with a token of text behind it, as Mistral 3 shows images.

Knows ids, grids and counts. Does not know budgets, or how soft tokens are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mllm.budget.tiling import Size, pooled_rows


@dataclass(frozen=True)
class RowBreaks:
    """Holds the ids that stand behind every row but the last, and behind the last."""

    behind_row: int
    behind_last: int


def row_sizes(grid: Size, tokens: int) -> list[int]:
    """List how many of the tokens pooled of a grid stand in each row; the rule of `mllm.compressors.area_pooling`."""
    rows = pooled_rows(tokens, grid)
    return [(row + 1) * tokens // rows - row * tokens // rows for row in range(rows)]


def in_rows(placeholder_id: int, grid: Size, tokens: int, breaks: RowBreaks) -> tuple[list[int], list[int]]:
    """Return the ids of an image, with one placeholder per row, and the soft tokens that each of them stands for."""
    sizes = row_sizes(grid, tokens)
    ids = [token for _ in sizes for token in (placeholder_id, breaks.behind_row)]
    return [*ids[:-1], breaks.behind_last], sizes


def without_breaks(ids: Sequence[int], placeholder_id: int, grid: Size) -> tuple[list[int], RowBreaks]:
    """Put one placeholder in the place of all rows of an image.

    Args:
        ids: of a prompt with one image, one placeholder per soft token.

    Raises:
        ValueError: rows of another kind than all of one length, with a token behind each.
    """
    rows, columns = grid
    start = list(ids).index(placeholder_id)
    end = start + rows * (columns + 1)
    shown = list(ids[start:end])
    if len(shown) < rows * (columns + 1):
        raise ValueError(f"the host's processor wrote fewer ids than {rows} rows of {columns} soft tokens have")
    breaks = RowBreaks(shown[columns], shown[-1])
    row = [placeholder_id] * columns
    expected = [token for _ in range(rows) for token in (*row, breaks.behind_row)]
    if shown[:-1] != expected[:-1] or placeholder_id in ids[end:] or placeholder_id in (shown[columns], shown[-1]):
        raise ValueError(f"the host's processor wrote no {rows} rows of {columns} soft tokens with a break behind each")
    if rows == 1:  # there is no row but the last to see what stands behind
        breaks = RowBreaks(NO_BREAK, shown[-1])
    return [*ids[:start], placeholder_id, *ids[end:]], breaks


NO_BREAK = -1
"""Of an image of one row: pooled, it has one row as well."""
