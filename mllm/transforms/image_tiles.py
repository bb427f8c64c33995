"""Cuts the pixels of an image into a thumbnail and tiles, as `mllm.budget.tiling` says.

Knows pixels and sizes. Does not know means and deviations (`transforms/encoder_inputs.py` does), tokens or budgets.

Source: LLaVA-NeXT's image processor. The image is scaled into rows x columns of tiles with its sides in proportion
(rounded up), centred, and black where nothing is; the thumbnail is the whole image squeezed into one tile.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mllm.budget.tiling import Size, Tiles


def cut(image: Image.Image, tilings: Sequence[Tiles], *, tile: Size, thumbnail: bool, resample: int = 3) -> Tensor:
    """Cut out the thumbnail, if there is one, and then the tiles of each cut, row by row.

    Args:
        image: RGB.
        tilings: cuts that share the thumbnail.
        tile: height and width of what the encoder reads, in pixels.
        resample: Pillow's number of the interpolation; 3 is bicubic.

    Returns:
        (P, 3, h, w) uint8.
    """
    pixels = image.convert("RGB")
    pieces = [_resized(pixels, tile, resample)[None]] if thumbnail else []
    for tiles in tilings:
        if tiles.count:
            size = (tiles.rows * tile[0], tiles.columns * tile[1])
            page = _centred(_resized(pixels, scaled_size((pixels.height, pixels.width), size), resample), size)
            # (3, rows * h, columns * w) -> (3, rows, h, columns, w) -> one piece per tile, row by row.
            grid = page.unflatten(2, (tiles.columns, tile[1])).unflatten(1, (tiles.rows, tile[0]))
            pieces.append(grid.permute(1, 3, 0, 2, 4).flatten(0, 1))
    return torch.cat(pieces)


def scaled_size(image: Sequence[int], room: Size) -> Size:
    """Return the height and width of an image scaled into a room, its sides in proportion."""
    by_height, by_width = room[0] / image[0], room[1] / image[1]
    if by_width < by_height:
        return min(math.ceil(image[0] * by_width), room[0]), room[1]
    return room[0], min(math.ceil(image[1] * by_height), room[1])


def _resized(image: Image.Image, size: Size, resample: int) -> Tensor:
    """Resize to (3, h, w) uint8 by Pillow, as transformers' image processors do, so that a tile is what they make."""
    made = image.resize((size[1], size[0]), resample=Image.Resampling(resample))
    return torch.from_numpy(np.array(made)).permute(2, 0, 1)


def _centred(pixels: Tensor, size: Size) -> Tensor:
    top, left = ((room - side) // 2 for room, side in zip(size, pixels.shape[-2:], strict=True))
    bottom, right = size[0] - pixels.shape[-2] - top, size[1] - pixels.shape[-1] - left
    return functional.pad(pixels, (left, right, top, bottom))
