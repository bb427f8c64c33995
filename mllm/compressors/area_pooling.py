"""Works out which features each soft token of an area pooling averages: exact covers of a stream or of a grid.

Knows lengths and counts. Does not know what the features are.

A soft token has a cell: a stretch of a stream or a rectangle of a grid, whose borders may cut through features. All
cells of an item have the same area and together they tile what they cover, so every feature has the same weight. A
cover holds, per cell and feature, the part (0..1) of the feature that lies inside the cell. Borders are kept as
integers in units small enough for all of them, hence nothing is rounded.

Shapes: N items, K cells, T features, a grid of H x W patches in reading order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def stream_cover(
    lengths: Tensor, tokens: Tensor, rates: Tensor, *, num_features: int, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Covers streams: cells are windows of `rates` features, or, at rate 0, `tokens` equal stretches of the item.

    Args:
        lengths, tokens, rates: (N,) int64; see `Compressor.forward`.
        num_features: T.
        max_tokens: K.

    Returns:
        cover (N, K, T) and the features per cell (N,), float32. Cells beyond an item's count are undefined.
    """
    by_rate = rates > 0
    # In units of 1/unit feature a cell is `width` long: r features at a rate, else length/tokens features.
    unit = torch.where(by_rate, 1, tokens.clamp(min=1))
    width = torch.where(by_rate, rates, lengths)
    # Half the memory of int64 where the largest border allows it.
    dtype = torch.int32 if (num_features + 1) * (max_tokens + 1) < 2**31 else torch.int64
    unit, width = unit.to(dtype), width.to(dtype)
    start = torch.arange(max_tokens, device=lengths.device, dtype=dtype) * width[:, None]
    feature = torch.arange(num_features, device=lengths.device, dtype=dtype)
    return _overlap(start, start + width[:, None], unit[:, None], feature), width / unit


def grid_cover(tokens: Tensor, grid: tuple[int, int], *, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Covers one grid shared by all items: cells are rows of rectangles, in reading order.

    The n cells of an item form R rows (see `grid_rows`). Row i holds the cells floor(i*n/R) .. floor((i+1)*n/R) - 1, so
    rows differ by at most one cell and the longer rows are spread evenly. A row is as high as its number of cells
    demands for all cells to be equal in area. Where R divides n this is a plain grid, and `avg_pool2d` if its cells are
    whole patches.

    Args:
        tokens: (N,) int64, cells of each item, 1..H*W.
        grid: (H, W).
        max_tokens: K.

    Returns:
        cover (N, K, H*W) and the patches per cell (N,), float32. Cells beyond an item's count are undefined.
    """
    height, width = grid
    count = tokens.clamp(min=1)[:, None]
    cells = _grid_cells(count, grid_rows(count[:, 0], grid)[:, None], max_tokens)
    down, across = (torch.arange(size, device=tokens.device) for size in grid)
    vertical = _overlap(height * cells.first, height * cells.after, count, down)  # in units of 1/n of a patch
    left, right = width * cells.column, width * (cells.column + 1)  # in units of 1/columns of a patch
    horizontal = _overlap(left, right, cells.columns, across)
    cover = vertical[..., :, None] * horizontal[..., None, :]
    return cover.flatten(2), height * width / count[:, 0]


def item_grid_cover(tokens: Tensor, grids: Tensor, *, num_features: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Covers items that have a grid each; the cells of an item are those of `grid_cover` on its grid.

    Args:
        tokens: (N,) int64, cells of each item, 1..H*W of its grid.
        grids: (N, 2) int64, rows and columns of each item.
        num_features: T, patches of the item that has most.
        max_tokens: K.

    Returns:
        cover (N, K, T), zero beyond an item's patches, and the patches per cell (N,), float32.
    """
    height, width = grids[:, :1], grids[:, 1:]
    count = tokens.clamp(min=1)[:, None]
    cells = _grid_cells(count, _rows_of(count, height, width, most=num_features)[:, None], max_tokens)
    patch = torch.arange(num_features, device=tokens.device)
    down, across = (patch // width)[:, None], (patch % width)[:, None]  # (N, 1, T); rows below the last are in no cell
    vertical = _overlap(height * cells.first, height * cells.after, count, down)
    horizontal = _overlap(width * cells.column, width * (cells.column + 1), cells.columns, across)
    area = height * width * count.reciprocal()  # rounded as in `grid_cover`, where torch divides a number by a tensor
    return vertical * horizontal, area[:, 0]


@dataclass(frozen=True)
class _Cells:
    """Where each cell of a grid lies: all tensors are (N, K).

    `first` and `after` are the first cell of its row and the one behind the row, `column` is its place in the row and
    `columns` the number of cells in the row.
    """

    first: Tensor
    after: Tensor
    column: Tensor
    columns: Tensor


def _grid_cells(count: Tensor, rows: Tensor, max_tokens: int) -> _Cells:
    cell = torch.arange(max_tokens, device=count.device)
    # Row i begins at cell floor(i * n / R); this is the only i with first <= cell < after, without a search.
    row = ((cell + 1) * rows - 1) // count
    first, after = row * count // rows, (row + 1) * count // rows
    return _Cells(first, after, cell - first, after - first)


def grid_rows(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Counts the rows that the cells of a grid form.

    Whole patches win: if the cells can be equal blocks of whole patches at most twice as long as they are wide, the
    squarest such blocks are taken, and of two equally square ones those in fewer rows. Otherwise the cells are as
    square as can be: R is the integer nearest to sqrt(n * H / W), within 1..n.

    Args:
        tokens: (N,) int64, 1..H*W.
        grid: (H, W).

    Returns:
        (N,) int64.
    """
    return _rows_of(tokens[:, None], *grid, most=grid[0])


def _rows_of(count: Tensor, height: Tensor | int, width: Tensor | int, *, most: int) -> Tensor:
    """Does what `grid_rows` does for counts (N, 1), on one grid or on one of at most `most` rows each (N, 1)."""
    # R >= r + 1 exactly where sqrt(n * H / W) is above r + 1/2.
    below = 2 * torch.arange(most, device=count.device) + 1
    nearest = (below.square() * width < 4 * count * height).sum(dim=1).clamp(min=1).minimum(count[:, 0])
    # Every number of rows is tried at once, since a search would make the host wait for the device.
    rows = torch.arange(1, most + 1, device=count.device)
    columns = (count // rows).clamp(min=1)
    whole = (rows * columns == count) & (height % rows == 0) & (width % columns == 0)
    flatness = rows.square() * width / (count * height)  # width over height of a cell, in patches
    stretch = torch.maximum(flatness, 1 / flatness).masked_fill(~whole, torch.inf)
    squarest = stretch.amin(dim=1, keepdim=True)
    fewest = rows[(stretch == squarest).int().argmax(dim=1)]
    return torch.where(squarest[:, 0] <= 2, fewest, nearest)


def average(features: Tensor, cover: Tensor, area: Tensor) -> Tensor:
    """Averages the features under each cell: (N, T, D), (N, K, T), (N,) -> (N, K, D).

    The sum comes before the division, so that whole features keep the weight 1 in any precision.
    """
    sums = torch.bmm(cover.to(features.dtype), features)
    return (sums / area[:, None, None]).to(features.dtype)


def _overlap(start: Tensor, end: Tensor, unit: Tensor, feature: Tensor) -> Tensor:
    """Computes which part of feature t, which spans [t * unit, (t + 1) * unit), lies inside [start, end).

    start, end, unit: (N, K). feature: (T,) or (N, 1, T), the numbers t. Returns (N, K, T).
    """
    unit = unit[..., None]
    feature = feature * unit
    inside = torch.minimum(end[..., None], feature + unit).sub_(torch.maximum(start[..., None], feature))
    return inside.clamp_(min=0) / unit
