"""Works out which part of an image each soft token covers, by what its compressor does.

Pooled tokens cover their cells, stacked ones their blocks, and those of queries what the queries look at. A weight
says how much of a token stems from a patch; those of a token sum to 1.

Knows compressors, grids and tiles. Does not know pixels, pages or requests.

Shapes: P images that the encoder sees (a thumbnail and tiles, or frames), m soft tokens of each, h x w patches of each,
n soft tokens in the prompt, H x W patches of all images laid out side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.budget import Extent, TokenCount
from mllm.budget.tiling import Size, Tiling
from mllm.compressors import Compressor, Hybrid, Pool, Query, Stack
from mllm.compressors.area_pooling import grid_cover
from mllm.compressors.haar import haar
from mllm.processing.token_order import NEWLINE, order_of

NO_TOKEN = -1


def coverage(
    compressor: Compressor, num_tokens: int, grid: Size, *, features: Tensor | None = None, has_own_grid: bool = False
) -> Tensor:
    """Compute which patches each soft token of one encoded image is made of.

    Args:
        num_tokens: m.
        grid: (h, w).
        features: (h * w, D) of the image, for those that `reads_features`.
        has_own_grid: images keep their shape, so positions are those of this grid.

    Returns:
        (m, h, w) float32, which sums to 1 over the patches.

    Raises:
        ValueError: a compressor of another package, of which this is not known.
    """
    if isinstance(compressor, Pool):
        weights = haar_coverage(num_tokens, grid) if compressor.order == "haar" else cell_coverage(num_tokens, grid)
    elif isinstance(compressor, Stack):
        rows = compressor.grid_rows[compressor.projectors.budgets.index(num_tokens)]
        weights = block_coverage((rows, num_tokens // rows), grid)
    elif isinstance(compressor, Query):
        attention = compressor.attention(num_tokens, features=features, grid=grid if has_own_grid else None)
        weights = attention.mean(dim=0).unflatten(1, grid)
    elif isinstance(compressor, Hybrid):
        assert features is not None
        attention = compressor.attention(num_tokens, features).mean(dim=0).unflatten(1, grid)
        weights = torch.cat([cell_coverage(num_tokens - len(attention), grid), attention.float().cpu()])
    else:
        raise ValueError(f"{type(compressor).__name__} does not tell which patches its soft tokens cover")
    return weights.float().cpu()


def reads_features(compressor: Compressor) -> bool:
    """Tell whether what a soft token covers depends on what the image shows."""
    return isinstance(compressor, Hybrid) or (isinstance(compressor, Query) and compressor.keys == "content")


def cell_coverage(num_tokens: int, grid: Size) -> Tensor:
    """Give each token of an area pooling its cell: (m, h, w)."""
    cover, area = grid_cover(torch.tensor([num_tokens]), grid, max_tokens=num_tokens)
    return (cover[0] / area).unflatten(1, grid)


def haar_coverage(num_tokens: int, grid: Size) -> Tensor:
    """Give each token in Haar order the patches whose means, or differences of means, it is: (m, h, w)."""
    patches = torch.eye(grid[0] * grid[1])[None]  # the transform is linear: of one-hot patches it gives its weights
    return haar(patches, grid)[0, :num_tokens].abs().unflatten(1, grid)


def block_coverage(blocks: Size, grid: Size) -> Tensor:
    """Give each token of rows x columns of blocks of whole patches its block: (m, h, w)."""
    rows, columns = blocks
    row = torch.arange(grid[0]) * rows // grid[0]
    column = torch.arange(grid[1]) * columns // grid[1]
    owner = row[:, None] * columns + column
    is_own = owner == torch.arange(rows * columns)[:, None, None]
    return is_own / is_own.sum(dim=(1, 2), keepdim=True)


@dataclass(frozen=True)
class Overlay:
    """Holds what each soft token of one medium in a prompt covers.

    Args:
        weights: (P, m, h, w).
        order: (n, 2) int64, the image and the token of it that stand at each position of the prompt (`order_of`).
        spots: per image, the row and the column of the layout where it is shown.
    """

    weights: Tensor
    order: Tensor
    spots: tuple[Size, ...]

    @classmethod
    def of(cls, weights: Tensor, extent: Extent, count: TokenCount, tiling: Tiling | None) -> "Overlay":
        """Lay out the images of one medium: tiles as they were cut, behind their thumbnail; frames in a row."""
        return cls(weights, order_of(extent, count, tiling), spots_of(count))

    @property
    def num_tokens(self) -> int:
        """Count the soft tokens in the prompt, newlines among them."""
        return len(self.order)

    def of_token(self, position: int) -> Tensor | None:
        """Find what the soft token at a position covers, (H, W); None for a newline, which covers no patch.

        Raises:
            ValueError: there is no such position.
        """
        if not 0 <= position < len(self.order):
            raise ValueError(f"there is no soft token {position + 1}; allowed: 1 to {len(self.order)}")
        image, token = self.order[position].tolist()
        if image == NEWLINE:
            return None
        page = [torch.zeros(self.weights.shape[2:]) for _ in self.spots]
        page[image] = self.weights[image, token]
        return laid_out(page, self.spots)

    def owners(self) -> Tensor:
        """Find the position in the prompt of the soft token that each patch weighs most in: (H, W) int64, -1 for none.

        A patch that only tokens look at which the prompt leaves out (those over padding) has none.
        """
        num_images, num_tokens = self.weights.shape[:2]
        positions = torch.full((num_images, num_tokens), NO_TOKEN)
        is_token = self.order[:, 0] != NEWLINE
        shown = self.order[is_token]
        positions[shown[:, 0], shown[:, 1]] = torch.arange(len(self.order))[is_token]
        # A token that the prompt leaves out must not win over one that it holds.
        weights = self.weights * (positions != NO_TOKEN)[..., None, None]
        most, best = weights.max(dim=1)  # (P, h, w)
        owner = positions.gather(1, best.flatten(1)).view(best.shape).masked_fill(most == 0, NO_TOKEN)
        return laid_out(list(owner), self.spots)


def spots_of(count: TokenCount) -> tuple[Size, ...]:
    """Say where each image that is shown lies in the layout, as rows and columns of images."""
    tiles = count.tiles
    if tiles is None:
        return tuple((0, number) for number in range(count.num_images))
    left = int(tiles.has_thumbnail)
    grid = [(row, left + column) for row in range(tiles.rows) for column in range(tiles.columns)]
    return ((0, 0), *grid) if tiles.has_thumbnail else tuple(grid)


def laid_out(images: Sequence[Tensor], spots: Sequence[Size]) -> Tensor:
    """Lay out images (..., h, w) of one size at their spots: (..., H, W), 0 or, in whole numbers, -1 between them."""
    height, width = images[0].shape[-2:]
    rows, columns = (1 + max(spot[axis] for spot in spots) for axis in (0, 1))
    empty = 0 if images[0].is_floating_point() else NO_TOKEN
    page = images[0].new_full((*images[0].shape[:-2], rows * height, columns * width), empty)
    for image, (row, column) in zip(images, spots, strict=True):
        page[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return page
