"""Cuts images of any resolution: into which tiles one is cut, and how many soft tokens that makes.

Knows sizes, caps and counts. Does not know torch, what pixels show, budgets as words, or how a tile is compressed.

An image is cut into rows x columns of tiles, each as large as the encoder reads, behind a thumbnail of the whole. Of
the sizes that rows x columns of tiles may have, the one is taken that keeps most of the image and, of equal ones,
wastes least (LLaVA-NeXT's rule). The image is scaled into it with its sides in proportion, and the rest is padding.

`spatial_unpad` puts the tokens of all tiles together as one map, cuts off what lies over padding, and ends every row of
the map with a newline: LLaVA-NeXT's order, at every number of tokens that forms a map. `flat` leaves the tiles one
after the other, whatever their tokens are, with a newline behind each row of tiles. `whole_map` puts the features of
all tiles together before any is pooled, cuts off what lies over padding, scales a large map down, and pools the map by
itself, with a newline behind each row: LLaVA-OneVision's order, at every number of tokens.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

Kind = Literal["pinpoints", "free"]
Merge = Literal["spatial_unpad", "flat", "whole_map"]
Size = tuple[int, int]
"""Height and width: in pixels, patches or tokens."""
LEAST_SHRINKING = 1.1
"""Maps that would be scaled down by no more than this are left as they are, as LLaVA-OneVision leaves them."""
LLAVA_NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of LLaVA-NeXT's five sizes, in its order, which decides between equally good ones."""


@dataclass(frozen=True)
class Tiles:
    """Says how one image is cut: rows x columns of tiles, 0 x 0 for none, behind a thumbnail if there is one."""

    rows: int
    columns: int
    has_thumbnail: bool

    @property
    def count(self) -> int:
        """Tiles, the thumbnail not among them."""
        return self.rows * self.columns

    @property
    def num_images(self) -> int:
        """What the encoder sees of it: the thumbnail and the tiles."""
        return self.count + int(self.has_thumbnail)

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Tiling:
    """Says how images are cut and put together again.

    Args:
        kind: `pinpoints` allows the sizes listed, `free` every rows x columns of at most `max_tiles`.
        pinpoints: (height, width) in pixels, each a multiple of a tile; empty means LLaVA-NeXT's five shapes.
        max_tiles: most tiles of an image; what is left of the pinpoints under it.
        thumbnail: whether the whole image, squeezed into a tile, comes first.
        merge: see the file's docstring.
        newline: whether a learned token ends the rows.
        keeps_single: cut an image of a single tile too, though its thumbnail shows the same.
        max_map_tiles: with `whole_map`, how many tiles' features a map may have before it is scaled down.
    """

    kind: Kind = "pinpoints"
    pinpoints: tuple[Size, ...] = ()
    max_tiles: int | None = None
    thumbnail: bool = True
    merge: Merge = "spatial_unpad"
    newline: bool = True
    keeps_single: bool = False
    max_map_tiles: int = 0

    def shapes(self, tile: Size) -> list[Size]:
        """List the rows and columns an image may be cut into, in the order that decides between equally good ones.

        Args:
            tile: size of a tile in pixels.

        Raises:
            ValueError: a pinpoint that is not made of whole tiles.
        """
        if self.kind == "free":
            most = self.max_tiles or 1
            grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
        elif self.pinpoints:
            for height, width in self.pinpoints:
                if height < 1 or width < 1 or height % tile[0] or width % tile[1]:
                    raise ValueError(
                        f"model.image.tiling.pinpoints holds {[height, width]}, which is not made of whole tiles of "
                        f"{list(tile)} pixels, the size this encoder reads"
                    )
            grids = [(height // tile[0], width // tile[1]) for height, width in self.pinpoints]
        else:
            grids = list(LLAVA_NEXT)
        return [grid for grid in grids if self.max_tiles is None or grid[0] * grid[1] <= self.max_tiles]

    def choose(self, image: Size, tile: Size, max_tiles: int | None = None) -> Tiles:
        """Choose the tiles of an image under a cap. One tile behind a thumbnail would repeat it, so there is none then.

        Args:
            image, tile: sizes in pixels.

        Raises:
            ValueError: a cap that leaves nothing to see; the caps that do not are named.
        """
        every = self.shapes(tile)
        shapes = [shape for shape in every if max_tiles is None or shape[0] * shape[1] <= max_tiles]
        if not shapes and not self.thumbnail:
            least = min(rows * columns for rows, columns in every)
            raise ValueError(f"tiles<={max_tiles} leaves nothing of an image without a thumbnail; allowed from {least}")
        best = _best(shapes, image, tile) if shapes else None
        if best is None or (best == (1, 1) and self.thumbnail and not self.keeps_single):
            return Tiles(0, 0, True)
        return Tiles(*best, self.thumbnail)

    def choices(self, image: Size, tile: Size, max_tiles: int | None = None) -> list[int]:
        """List the caps up to a cap that matter to an image, largest first: with each of them it is cut differently."""
        counts = {rows * columns for rows, columns in self.shapes(tile)} | ({0} if self.thumbnail else set())
        chosen = {self.choose(image, tile, cap).count for cap in counts if max_tiles is None or cap <= max_tiles}
        return sorted(chosen, reverse=True)

    def num_tokens(self, tiles: Tiles, each: int, *, image: Size, tile: Size, grid: Size) -> int:
        """Soft tokens of an image, newlines included.

        Args:
            each: tokens of every tile.
            image, tile: sizes in pixels.
            grid: patches of a tile.

        Raises:
            ValueError: tokens that do not form a map, where the merge needs one; the counts that do are named.
        """
        if self.merge == "flat":
            return tiles.num_images * each + (tiles.rows if self.newline else 0)
        if self.merge == "whole_map" and tiles.count:
            pooled, whole = self.map_tokens(tiles, each, image=image, grid=grid), self.map_size(tiles, grid, image)
            return each * int(tiles.has_thumbnail) + pooled + int(self.newline) * pooled_rows(pooled, whole)
        shape = map_of(each, grid)
        if not tiles.count:
            return each + int(self.newline)
        _, _, height, width = kept_map(tiles, shape, image)
        return each * int(tiles.has_thumbnail) + height * (width + int(self.newline))

    def map_size(self, tiles: Tiles, grid: Size, image: Size) -> Size:
        """Return the rows and columns of features of the map of all tiles, without padding and scaled down.

        Args:
            tiles: at least one.
            grid: patches of a tile.
            image: its size, in pixels.
        """
        _, _, height, width = kept_map(tiles, grid, image)
        shrink = math.sqrt(height * width / (self.max_map_tiles * grid[0] * grid[1]))
        if shrink <= LEAST_SHRINKING:
            return height, width
        return int(height // shrink), int(width // shrink)

    def map_tokens(self, tiles: Tiles, each: int, *, image: Size, grid: Size) -> int:
        """Count the tokens, newlines not among them, of a map that is pooled by itself; 0 where none is.

        It has as many per feature as the thumbnail has, rounded down, and at least one.

        Args:
            each: tokens of the thumbnail.
            image, grid: as in `map_size`.
        """
        if self.merge != "whole_map" or not tiles.count:
            return 0
        height, width = self.map_size(tiles, grid, image)
        return max(1, height * width * each // (grid[0] * grid[1]))


def _best(shapes: Sequence[Size], image: Size, tile: Size) -> Size:
    """The shape that keeps the most pixels of an image and, of those, wastes the fewest."""
    height, width = image
    best, best_key = shapes[0], (-1, 0)
    for rows, columns in shapes:
        full_height, full_width = rows * tile[0], columns * tile[1]
        # In floats, as transformers' select_best_resolution computes it: a pixel more or less decides ties.
        scale = min(full_width / width, full_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if (key := (kept, kept - full_height * full_width)) > best_key:
            best, best_key = (rows, columns), key
    return best


def map_of(count: int, grid: Size) -> Size:
    """Return the rows and columns that `count` pooled tokens of a grid form, where every row is equally long.

    Raises:
        ValueError: rows that are not; the counts that do form a map are named.
    """
    most = grid[0] * grid[1]
    if 1 <= count <= most and count % (rows := pooled_rows(count, grid)) == 0:
        return rows, count // rows
    by_distance = sorted(range(1, most + 1), key=lambda n: abs(n - count))
    near = list(itertools.islice((n for n in by_distance if n % pooled_rows(n, grid) == 0), 41))
    words, near = ("those that do", near) if len(near) <= 40 else ("the nearest that do", near[:12])
    raise ValueError(
        f"{count} tokens of {grid[0]} x {grid[1]} features form no map of equal rows; {words}: "
        f"{', '.join(map(str, sorted(near)))}"
    )


def largest_map(most: int, grid: Size) -> int:
    """Return the largest count of at most `most`, from 1 on, whose pooled tokens of a grid form a map; see `map_of`."""
    return next(count for count in range(most, 0, -1) if count % pooled_rows(count, grid) == 0)


@lru_cache(maxsize=4096)
def pooled_rows(count: int, grid: Size) -> int:
    """Count the rows that `count` pooled tokens form; the rule of `mllm.compressors.area_pooling.grid_rows`, in
    numbers.

    Whole patches win where that makes cells at most twice as long as wide, the squarest and then the fewest rows;
    otherwise the cells are as square as can be.
    """
    height, width = grid
    whole: dict[int, Fraction] = {}
    for rows in range(1, min(height, count) + 1):
        if count % rows == 0 and height % rows == 0 and width % (count // rows) == 0:
            flatness = Fraction(rows * rows * width, count * height)
            whole[rows] = max(flatness, 1 / flatness)
    if whole and min(whole.values()) <= 2:
        return min(whole, key=lambda rows: (whole[rows], rows))
    below = sum((2 * row + 1) ** 2 * width < 4 * count * height for row in range(height))
    return min(max(below, 1), count)


def kept_map(tiles: Tiles, shape: Size, image: Size) -> tuple[int, int, int, int]:
    """Return the part of the merged grid that does not lie over padding: top, left, height, width.

    As transformers' `unpad_image` counts it, except that a row or a column always stays: at one token per tile a
    image that is far from the shape of its tiles would vanish.

    Args:
        tiles: at least one.
        shape: rows and columns of the tokens of a tile.
        image: its size, in pixels.
    """
    height, width = tiles.rows * shape[0], tiles.columns * shape[1]
    full_height, full_width = image
    if full_width / full_height > width / height:
        used = int(round(full_height * (width / full_width), 7))
        top = min((height - used) // 2, (height - 1) // 2)
        return top, 0, height - 2 * top, width
    used = int(round(full_width * (height / full_height), 7))
    left = min((width - used) // 2, (width - 1) // 2)
    return 0, left, height, width - 2 * left
