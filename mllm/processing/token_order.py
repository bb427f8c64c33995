"""Orders the soft tokens of one medium in the prompt: tiles put together, newlines, frames in turn.

Knows tiles, counts and numbers of items. Does not know images, budgets as words, or the model.

Shapes: n soft tokens of one medium in the prompt, each a pair (piece, token): the token-th token of the piece-th
encoded image that is shown, or (NEWLINE, 0) for the learned newline.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mllm.budget import Extent, TokenCount
from mllm.budget.tiling import Size, Tiles, Tiling, kept_map, map_of
from mllm.hosts.rows import row_sizes

NEWLINE = -1


def shown_items(extent: Extent, cost: TokenCount, tilings: Sequence[Tiles] = ()) -> list[int]:
    """Say which of the encoded images of one medium item are shown, counted from its first.

    Frames are taken evenly, from the middle of each stretch that one of them stands for.

    Args:
        tilings: the cuts whose tiles were encoded, one after the other behind the thumbnail they share.

    Raises:
        ValueError: a cut whose tiles were not.
    """
    if cost.frames:
        stride = extent.num_images // cost.frames
        return list(range((stride - 1) // 2, extent.num_images, stride))
    if cost.tiles is None:
        return list(range(cost.num_images))
    thumbnail = [0] if cost.tiles.has_thumbnail else []
    if not cost.tiles.count:
        return thumbnail
    if cost.tiles not in tilings:
        known = ", ".join(map(str, tilings)) or "no tiles"
        raise ValueError(
            f"the image was loaded as {known} and its budget cuts it into {cost.tiles}: load media with the budgets "
            "they are asked at"
        )
    if cost.map_tokens:  # the tiles are one encoded item behind the thumbnail
        return [0, 1]
    start = len(thumbnail) + sum(other.count for other in tilings[: list(tilings).index(cost.tiles)])
    return [*thumbnail, *range(start, start + cost.tiles.count)]


def order_of(extent: Extent, cost: TokenCount, tiling: Tiling | None) -> Tensor:
    """Return the order of one medium's soft tokens, (n, 2) int64; pieces are numbered as `shown_items` gives them."""
    each = cost.each or cost.tokens
    if cost.tiles is None or tiling is None:
        return _in_turn(cost.num_images, each)
    if tiling.merge == "flat":
        return _flat(cost.tiles, each, tiling.newline)
    assert extent.grid is not None
    assert extent.image_pixels is not None
    if cost.map_tokens:
        whole = tiling.map_size(cost.tiles, extent.grid, extent.image_pixels)
        return _whole_map(each, tuple(row_sizes(whole, cost.map_tokens)))
    shape = map_of(each, extent.grid)
    kept = kept_map(cost.tiles, shape, extent.image_pixels) if cost.tiles.count else None
    return _spatial(cost.tiles, shape, kept, tiling.newline)


def _in_turn(pieces: int, each: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(pieces), torch.arange(each)).view(-1, 2)


@lru_cache(maxsize=512)
def _flat(tiles: Tiles, each: int, newline: bool) -> Tensor:
    order = _in_turn(tiles.num_images, each)
    if not newline or not tiles.count:
        return order
    first = each * int(tiles.has_thumbnail)
    rows = order[first:].view(tiles.rows, tiles.columns * each, 2)
    return torch.cat([order[:first], _with_newlines(rows)])


@lru_cache(maxsize=512)
def _spatial(tiles: Tiles, shape: Size, kept: tuple[int, int, int, int] | None, newline: bool) -> Tensor:
    """Order the thumbnail, then the grid of all tiles row by row. A thumbnail alone is a single row (LLaVA-NeXT's
    order).
    """
    thumbnail = _in_turn(int(tiles.has_thumbnail), shape[0] * shape[1])
    if kept is None:
        return _with_newlines(thumbnail[None]) if newline else thumbnail
    # Every cell of the grid that all tiles make together says which tile it is of, and which token of that tile.
    # Cutting the grid then leaves out what lies over padding, whichever tiles that is in.
    row, column = torch.arange(tiles.rows * shape[0])[:, None], torch.arange(tiles.columns * shape[1])[None]
    piece = row // shape[0] * tiles.columns + column // shape[1] + int(tiles.has_thumbnail)
    token = row % shape[0] * shape[1] + column % shape[1]
    top, left, height, width = kept
    rows = torch.stack([piece, token], dim=-1)[top : top + height, left : left + width]
    return torch.cat([thumbnail, _with_newlines(rows) if newline else rows.flatten(0, 1)])


@lru_cache(maxsize=512)
def _whole_map(each: int, sizes: tuple[int, ...]) -> Tensor:
    """Order the thumbnail, then the rows of the map, which need not be equally long."""
    rows = torch.stack([torch.ones(sum(sizes), dtype=torch.int64), torch.arange(sum(sizes))], dim=-1).split(sizes)
    return torch.cat([_in_turn(1, each), *(_with_newlines(row[None]) for row in rows)])


def _with_newlines(rows: Tensor) -> Tensor:
    """Put a newline behind each row: (rows, columns, 2) -> (rows * (columns + 1), 2)."""
    ends = torch.tensor([NEWLINE, 0]).expand(len(rows), 1, 2)
    return torch.cat([rows, ends], dim=1).flatten(0, 1)
