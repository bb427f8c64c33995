"""Brings a grid into Haar order: a coarse grid first, then what each doubling adds, so that prefixes are whole grids.

Knows grids and their halves. Does not know media, budgets, or what a feature means.

A coarse grid is doubled along one axis at a time: its columns, then its rows, then its columns again, until it is the
full one. A cell of value m that is split in halves of values a and b has m = (a + b) / 2, and its detail is
d = (a - b) / 2; with it the halves are m + d and m - d. The tokens are the coarsest grid in reading order, then the
details of the first doubling in the reading order of the cells they split, then those of the second, and so on. A
prefix that ends with a doubling is an invertible transform of the grid averaged over that many equal cells: nothing of
that grid is lost, and nothing of it is said twice. All values are means or half differences of means, so no token grows
with the grid; a transform that keeps lengths would make the coarse grid larger by the root of the features it averages.

Shapes: N items, T features of a grid of H x W in reading order, D feature size, K tokens.
Source: Haar (1910); the pyramid it makes prefix-nested is that of M3 (arXiv 2405.17430), all but its last count of 1
where the coarsest grid is 3 x 3.
"""

from itertools import pairwise

import torch
from torch import Tensor

from mllm.budget.nesting import haar_grids


def haar(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Transforms a grid into its tokens in Haar order: (N, T, D) -> (N, T, D)."""
    grids = features.unflatten(1, grid)
    details = []
    for coarse, fine in reversed(_doublings(grid)):
        # Halve the axis that this doubling doubles: pairs of neighbours become their mean, which the next step halves
        # again, and their half difference, which is a token.
        axis = 1 if coarse[0] < fine[0] else 2
        first, second = grids.unflatten(axis, (coarse[axis - 1], 2)).unbind(dim=axis + 1)
        details.append(((first - second) / 2).flatten(1, 2))
        grids = (first + second) / 2
    return torch.cat([grids.flatten(1, 2), *reversed(details)], dim=1)


def inverse_haar(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Restores the grid that a prefix spans, as the inverse of `haar`: (N, K, D) -> (N, K, D) in reading order.

    Args:
        tokens: the first K tokens of a grid in Haar order.
        grid: (H, W) of the features.

    Raises:
        ValueError: K tokens are no whole grid.
    """
    sizes = haar_grids(grid)
    count = tokens.shape[1]
    if count not in (counts := [rows * columns for rows, columns in sizes]):
        raise ValueError(f"{count} tokens in Haar order are no whole grid; allowed: {', '.join(map(str, counts))}")
    grids = tokens[:, : counts[0]].unflatten(1, sizes[0])
    for coarse, fine in _doublings(grid)[: counts.index(count)]:
        axis = 1 if coarse[0] < fine[0] else 2
        size = coarse[0] * coarse[1]
        detail = tokens[:, size : 2 * size].unflatten(1, coarse)
        grids = torch.stack([grids + detail, grids - detail], dim=axis + 1).flatten(axis, axis + 1)
    return grids.flatten(1, 2)


def _doublings(grid: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs each grid with the one twice as large, coarse first."""
    grids = haar_grids(grid)
    return list(pairwise(grids))
