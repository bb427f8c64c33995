"""Computes soft tokens of images whose tiles are read as one map, scaled down where it is large: LLaVA-OneVision's.

Such an image makes two encoded items: the thumbnail, a grid as that of any tile; and the map of all tiles behind it,
without what lies over padding and without newlines. How large a map is follows from the size of the image and the
host's config alone, by `mllm.budget.tiling`; it stands beside the pixels as six numbers, see `MapSizes`.

Knows tiles in the order of the host's processor. Does not know how an image was cut, or budgets.

Shapes: N items, P tiles of the item that has most, D = 3 * h * w values of a tile, t = s * s features of a tile, T
features of the longest item, H the LLM's hidden size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mllm.budget.tiling import Size, Tiles, Tiling, kept_map
from mllm.hosts.tiles import image_side, unpacked_features


class MapSizes(NamedTuple):
    """Holds the sizes of an item: of the map that is read, of its tiles, and of what they show without padding.

    Args:
        rows, columns: of features, after the map is scaled down.
        tile_rows, tile_columns: of the tiles it is made of.
        kept_rows, kept_columns: of the features that do not lie over padding, before the map is scaled down.
    """

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    kept_rows: int
    kept_columns: int


def map_items(
    values: Tensor, tiles: Tiles, tiling: Tiling, *, image_pixels: Size, grid: Size
) -> tuple[Tensor, tuple[MapSizes, MapSizes]]:
    """Put the tiles of an image behind each other as the two items that are encoded.

    Args:
        values: (1 + P, 3, h, w), the thumbnail first.
        grid: patches of a tile.

    Returns:
        (2, P, D), the thumbnail as one tile and zeros, and the sizes of both.
    """
    _, _, *kept = kept_map(tiles, grid, image_pixels)
    sizes = MapSizes(*tiling.map_size(tiles, grid, image_pixels), tiles.rows, tiles.columns, *kept)
    pixels = values.flatten(1)
    return pad_sequence([pixels[:1], pixels[1:]], batch_first=True), (MapSizes(*grid, 1, 1, *grid), sizes)


def map_features(body: Any, values: Tensor, sizes: Tensor) -> Tensor:
    """Encode the tiles of items, and put those of each together as the host does.

    Args:
        body: the host without its head.
        values: (N, P, D).
        sizes: (N, 6) int64, as `MapSizes`.

    Returns:
        (N, T, H), each item in reading order.
    """
    side, num_tiles = image_side(body.config), sizes[:, 2] * sizes[:, 3]
    # One pass over all tiles in their order, as the host makes it: kernels may round otherwise in another one.
    is_tile = torch.arange(values.shape[1], device=values.device) < num_tiles[:, None]
    features = unpacked_features(body, values[is_tile].unflatten(1, (-1, side, side)))
    items = zip(features.split(num_tiles.tolist()), sizes.tolist(), strict=True)
    return pad_sequence([_map(tiles, MapSizes(*numbers)) for tiles, numbers in items], batch_first=True)


def _map(features: Tensor, sizes: MapSizes) -> Tensor:
    """Put the features (P, t, H) of an item's tiles together as one map, in reading order (T, H)."""
    side = math.isqrt(features.shape[1])
    cells = features.view(sizes.tile_rows, sizes.tile_columns, side, side, -1)
    whole = cells.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    top = (whole.shape[1] - sizes.kept_rows) // 2
    left = (whole.shape[2] - sizes.kept_columns) // 2
    kept = whole[:, top : top + sizes.kept_rows, left : left + sizes.kept_columns]
    if kept.shape[1:] != (sizes.rows, sizes.columns):
        kept = functional.interpolate(kept[None], (sizes.rows, sizes.columns), mode="bilinear")[0]
    return kept.flatten(1).T
