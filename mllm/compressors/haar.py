"""The Haar order of a grid: a coarse map first, then what each doubling of the map adds, so that prefixes are maps.

Knows grids and their halves. Does not know media, budgets, or what a feature means.

A map is doubled along one axis at a time: its columns, then its rows, then its columns again, until it is the grid.
A cell of value m that is split in halves of values a and b has m = (a + b) / 2, and its detail is d = (a - b) / 2; with
it the halves are m + d and m - d. The tokens are the coarsest map in reading order, then the details of the first
doubling in the reading order of the cells they split, then those of the second, and so on. A prefix that ends with a
doubling is an invertible transform of the grid averaged over that many equal cells: nothing of that map is lost, and
nothing of it is said twice. All values are means or half differences of means, so no token grows with the grid; a
transform that keeps lengths would make the coarse map larger by the root of the features it averages.

Shapes: N items, T features of a grid of H x W in reading order, D feature size, K tokens.
Source: Haar (1910); the pyramid it makes prefix-nested is that of M3 (arXiv 2405.17430), all but its last count of 1
where the coarsest map is 3 x 3.
"""

from itertools import pairwise

import torch
from torch import Tensor

from mllm.budget.nesting import haar_grids


def haar(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """All tokens of a grid in Haar order: (N, T, D) -> (N, T, D)."""
    maps = features.unflatten(1, grid)
    details = []
    for coarse, fine in reversed(_doublings(grid)):
        axis = 1 if coarse[0] < fine[0] else 2
        first, second = maps.unflatten(axis, (coarse[axis - 1], 2)).unbind(dim=axis + 1)
        details.append(((first - second) / 2).flatten(1, 2))
        maps = (first + second) / 2
    return torch.cat([maps.flatten(1, 2), *reversed(details)], dim=1)


def haar_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map that a prefix spans, the inverse of `haar`: (N, K, D) -> (N, K, D) in reading order.

    Args:
        tokens: the first K tokens of a grid in Haar order.
        grid: (H, W) of the features.

    Raises:
        ValueError: K tokens are no whole map of this grid.
    """
    grids = haar_grids(grid)
    count = tokens.shape[1]
    if count not in (counts := [rows * columns for rows, columns in grids]):
        raise ValueError(f"{count} tokens in Haar order are no whole map; allowed: {', '.join(map(str, counts))}")
    maps = tokens[:, : counts[0]].unflatten(1, grids[0])
    for coarse, fine in _doublings(grid)[: counts.index(count)]:
        axis = 1 if coarse[0] < fine[0] else 2
        size = coarse[0] * coarse[1]
        detail = tokens[:, size : 2 * size].unflatten(1, coarse)
        maps = torch.stack([maps + detail, maps - detail], dim=axis + 1).flatten(axis, axis + 1)
    return maps.flatten(1, 2)


def _doublings(grid: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Each map with the one twice as large, coarse first."""
    grids = haar_grids(grid)
    return list(pairwise(grids))
