"""Gives the tokens of a prompt positions in three dimensions: time, row and column, as Qwen-VL and GLM-4V have them.

Text counts on in all three at once. An image has one time, and the rows and columns of its grid, all from where the
text before it ended; the text behind it begins after the longer side of the grid. A pooled token stands at the mean of
the positions of what it was pooled of, rounded down, and the text behind keeps its positions: a budget moves nothing,
and at the full one every position is the host's own. Or pooled tokens are given the grid that they form themselves, and
stand as those of an image that small.

Positions are said once per prompt, as a table by the number of a token in its row. Beyond the table's end they count on
in all dimensions. So a decoder that is somewhere in an answer needs a table of one entry.

Knows ids, grids and counts. Does not know budgets, padding or who reads the table.

Shapes: B rows, L positions of a pass, P entries of a table, n soft tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mllm.compressors.area_pooling import average, item_grid_cover

_TOLERANCE = 1e-3
"""Means that are whole numbers may fall short of them by rounding."""


@dataclass(frozen=True)
class PlacedImage:
    """Says what is shown of an image: rows and columns of its grid, and its soft tokens."""

    grid: tuple[int, int]
    tokens: int


def row_positions(ids: Sequence[int], placeholder_id: int, images: Sequence[PlacedImage]) -> Tensor:
    """Compute the positions of one row without padding.

    Args:
        ids: with one placeholder per soft token.
        images: in order of appearance.

    Returns:
        (S, 3) int64.
    """
    remaining = iter(images)
    parts: list[Tensor] = []
    start = index = 0
    while index < len(ids):
        if ids[index] != placeholder_id:
            end = next((n for n in range(index, len(ids)) if ids[n] == placeholder_id), len(ids))
            parts.append(torch.arange(start, start + end - index)[:, None].expand(-1, 3))
            start, index = start + end - index, end
            continue
        image = next(remaining)
        assert all(token == placeholder_id for token in ids[index : index + image.tokens])
        parts.append(start + _pooled_positions(*image.grid, image.tokens))
        start, index = start + max(image.grid), index + image.tokens
    assert next(remaining, None) is None
    return torch.cat(parts)


@lru_cache(maxsize=256)
def _pooled_positions(rows: int, columns: int, tokens: int) -> Tensor:
    """Compute the positions (n, 3) of an image's tokens from its own beginning."""
    patch = torch.arange(rows * columns)
    positions = torch.stack([torch.zeros_like(patch), patch // columns, patch % columns], dim=-1)
    if tokens == len(positions):
        return positions
    cover = item_grid_cover(
        torch.tensor([tokens]), torch.tensor([[rows, columns]]), num_features=len(positions), max_tokens=tokens
    )
    return (average(positions[None].float(), *cover)[0] + _TOLERANCE).floor().long()


def position_table(rows: Sequence[Tensor]) -> Tensor:
    """Stack the positions of rows (S, 3) of several lengths to a table (B, P, 3); short rows count on."""
    longest = max(map(len, rows))
    return torch.stack([_counted_on(positions, longest) for positions in rows])


def _counted_on(positions: Tensor, length: int) -> Tensor:
    beyond = torch.arange(1, length - len(positions) + 1)[:, None]
    return torch.cat([positions, positions[-1:] + beyond])


def look_up(table: Tensor, numbers: Tensor) -> Tensor:
    """Look the positions of tokens up.

    Args:
        table: (B, P, 3).
        numbers: (B, L) number of each token in its row; what is below 0 is padding, whose position does not matter.

    Returns:
        (3, B, L), as decoders take them.
    """
    last = table.shape[1] - 1
    inside = numbers.clamp(0, last)
    positions = table.gather(1, inside[..., None].expand(-1, -1, 3)) + (numbers - last).clamp(min=0)[..., None]
    return positions.permute(2, 0, 1)
