"""Tells at which resolutions a host's processor can see an image, and what each costs, of the image's size alone.

Knows image processors by the plain values they are saved as, and sizes. Does not know images or weights.

There is one function per way of resizing. It tells how a setting sees an image, and must say what the processor itself
does: a tile or a row more or less and the prompt has other placeholders than the image has features. Smaller settings
than its default are tried from the largest down. The arithmetic is the processors' own, floating point included.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mllm.budget.resolution import Resolution
from mllm.budget.tiling import Size, Tiling

Values = Mapping[str, Any]
MAX_EDGE_PIXELS = 4096
"""Idefics3's processor and those after it make no image longer than this."""
MOST_RATIO = 200
"""Qwen-VL's processors refuse images that are longer by more than this."""
GEMMA4_TOKENS = (1120, 560, 280, 140, 70)
"""All that its processor takes as `max_soft_tokens`."""


class Seen(NamedTuple):
    """Tells how an image is seen: so many encoded images, and the rows and columns of one that keeps its shape."""

    num_images: int
    grid: Size | None = None


@dataclass(frozen=True)
class ResizingKind:
    """Describes a way of resizing.

    Args:
        seen: how an image of height and width is seen at a setting, by the processor's plain values.
        settings: smaller ones than the default at which anything is left of an image, from the largest down.
        default: the setting that those values mean.
        keywords: what makes the processor take a setting, by the same values.
        is_monotone: a smaller setting never has more tokens, so that long lists of them are not gone through.
    """

    seen: Callable[[Values, Size, int], Seen]
    settings: Callable[[Values, Size], Sequence[int]]
    default: Callable[[Values], int]
    keywords: Callable[[Values, int], dict[str, Any]]
    is_monotone: bool = False


@dataclass(frozen=True)
class HostResizing:
    """Chooses resolutions of a host's images. Implements `mllm.budget.resolution.Resizing`.

    Args:
        kind: of `RESIZING`.
        values: plain values of the image processor, and over them the arguments of the processor that it is a part of.
        tokens: of one encoded image at the full budget, where all have as many.
    """

    kind: ResizingKind
    values: Values
    tokens: int

    def default(self, image: Size) -> Resolution:
        """Return what the processor does unless it is told otherwise.

        Raises:
            ValueError: an image of a shape that the processor refuses.
        """
        return self._at(image, self.kind.default(self.values), is_default=True)

    def at_most(self, image: Size, max_tokens: int) -> Resolution:
        """Return the first resolution, from the default down, of at most so many tokens.

        Raises:
            ValueError: none has so few, and the message names the smallest; or as `default`.
        """
        default = self.default(image)
        if default.tokens <= max_tokens:
            return default
        settings = self.kind.settings(self.values, image)
        if self.kind.is_monotone:
            start = bisect_left(settings, -max_tokens, key=lambda setting: -self._at(image, setting).tokens)
            settings = settings[min(start, len(settings) - 1) :][:1]
        return _first([default, *(self._at(image, setting) for setting in settings)], image, max_tokens)

    def resolutions(self, image: Size) -> list[Resolution]:
        """List all, the default first."""
        settings = self.kind.settings(self.values, image)
        return [self.default(image), *(self._at(image, setting) for setting in settings)]

    def keywords(self, setting: int | None) -> dict[str, Any]:
        """Return what the processor is called with for a setting of a resolution."""
        return {} if setting is None else self.kind.keywords(self.values, setting)

    def _at(self, image: Size, setting: int, *, is_default: bool = False) -> Resolution:
        num_images, grid = self.kind.seen(self.values, image, setting)
        each = self.tokens if grid is None else grid[0] * grid[1]
        return Resolution(None if is_default else setting, num_images, num_images * each, grid)


@dataclass(frozen=True)
class TilesResizing:
    """Chooses resolutions of images whose tiles are put together as one map, as `HostResizing` does of others.

    Settings are the most tiles of an image: a host of whose sizes, `image_grid_pinpoints`, those with more are left
    out. It always sees the thumbnail and at least the tiles of its smallest size.

    Args:
        tiling: of the host.
        tile: its pixels.
        grid: patches of a tile.
    """

    tiling: Tiling
    tile: Size
    grid: Size

    def default(self, image: Size) -> Resolution:
        """Return what the processor does unless it is told otherwise."""
        return self._at(image, None)

    def at_most(self, image: Size, max_tokens: int) -> Resolution:
        """Return the first resolution, from the default down, of at most so many tokens.

        Raises:
            ValueError: none has so few, and the message names the smallest.
        """
        return _first(self.resolutions(image), image, max_tokens)

    def resolutions(self, image: Size) -> list[Resolution]:
        """List all, the default first."""
        fewer = [most for most in self.tiling.choices(image, self.tile)[1:] if most]
        return [self.default(image), *(self._at(image, most) for most in fewer)]

    def pinpoints(self, max_tiles: int) -> list[list[int]]:
        """List the sizes, of those of the host, that a setting leaves."""
        area = self.tile[0] * self.tile[1]
        return [list(size) for size in self.tiling.pinpoints if size[0] * size[1] <= max_tiles * area]

    def _at(self, image: Size, setting: int | None) -> Resolution:
        tiles, each = self.tiling.choose(image, self.tile, setting), self.grid[0] * self.grid[1]
        tokens = self.tiling.num_tokens(tiles, each, image=image, tile=self.tile, grid=self.grid)
        return Resolution(setting, tiles.num_images, tokens)


def _first(resolutions: Sequence[Resolution], image: Size, max_tokens: int) -> Resolution:
    """Return the first of at most so many tokens.

    Raises:
        ValueError: none has so few, and the message names the smallest.
    """
    if (first := next((one for one in resolutions if one.tokens <= max_tokens), None)) is not None:
        return first
    height, width = image
    raise ValueError(
        f"image<={max_tokens} cannot be met: an image of {height} x {width} pixels takes at least "
        f"{min(one.tokens for one in resolutions)} tokens before it is pooled; image=N pools them"
    )


def resizing_of(model_type: str, values: Values, tokens: int) -> HostResizing | None:
    """Return how a host's images are resized; None where they are seen at one size.

    Args:
        values: plain values of its image processor, and over them the arguments of its processor.
        tokens: of one encoded image at the full budget, where all have as many.
    """
    kind = RESIZING.get(model_type)
    return None if kind is None else HostResizing(kind, values, tokens)


def idefics_tiles(values: Values, image: Size, longest_edge: int) -> Seen:
    """Count the tiles of Idefics3 and SmolVLM: the image is made so long, and cut into squares, the whole behind them.

    The image becomes a rectangle of whole squares first, so that it loses its shape a little.
    """
    height, width = image
    tile = int(values["max_image_size"]["longest_edge"])
    if not values.get("do_image_splitting", True):
        return Seen(1)
    # The processor computes sides by way of the ratio, in floating point, and makes the shorter one even.
    ratio = width / height
    if width >= height:
        width, height = longest_edge, _even(int(longest_edge / ratio))
    else:
        width, height = _even(int(longest_edge * ratio)), longest_edge
    height, width = _within_max_edge(max(height, 1), max(width, 1))
    # Once more, so that the shorter side is that of the longer one in whole squares.
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return Seen(1 if max(height, width) <= tile else (height // tile) * (width // tile) + 1)


def _even(pixels: int) -> int:
    return pixels + pixels % 2


def _within_max_edge(height: int, width: int) -> Size:
    ratio = width / height
    if width >= height and width > MAX_EDGE_PIXELS:
        return max(int(MAX_EDGE_PIXELS / ratio), 1), MAX_EDGE_PIXELS
    if height > width and height > MAX_EDGE_PIXELS:
        return MAX_EDGE_PIXELS, max(int(MAX_EDGE_PIXELS * ratio), 1)
    return height, width


def _idefics_settings(values: Values, _: Size) -> range:
    """List whole numbers of tiles along the longer side, which is where the count changes."""
    tile = int(values["max_image_size"]["longest_edge"])
    default = int(values["size"]["longest_edge"])
    return range((default - 1) // tile * tile, 0, -tile)


def internvl_tiles(values: Values, image: Size, max_tiles: int) -> Seen:
    """Count the tiles of InternVL and Aya Vision: the arrangement nearest to the image's ratio, and the whole behind.

    Of arrangements that are as near, the later one counts if it is not twice as large as the image.
    """
    if max_tiles == 1:
        return Seen(1)
    (height, width), least = image, int(values["min_patches"])
    tile_area = int(values["size"]["height"]) * int(values["size"]["width"])
    nearest, best = math.inf, (1, 1)
    for columns, rows in _arrangements(least, max_tiles):
        distance = abs(width / height - columns / rows)
        is_no_larger = height * width > 0.5 * tile_area * columns * rows
        if distance < nearest or (distance == nearest and is_no_larger):
            nearest, best = distance, (columns, rows)
    return _with_whole(best[0] * best[1])


def cohere_tiles(values: Values, image: Size, max_tiles: int) -> Seen:
    """Count the tiles of Cohere's vision models: the arrangement that enlarges least, or else shrinks least."""
    (height, width), tile = image, int(values["size"]["height"])
    scales = [
        (min(columns * tile / width, rows * tile / height), columns * rows)
        for columns, rows in _arrangements(1, max_tiles)
    ]
    enlarging = [(scale, number) for scale, number in scales if scale >= 1]
    # `min` and `max` take the first of equals, as the processor does.
    _, num_tiles = min(enlarging, key=_scale) if enlarging else max(scales, key=_scale)
    return _with_whole(num_tiles)


def _with_whole(num_tiles: int) -> Seen:
    """Count the whole image, which stands behind its tiles where there are several."""
    return Seen(num_tiles + 1 if num_tiles > 1 else 1)


def _scale(scaled: tuple[float, int]) -> float:
    return scaled[0]


def _arrangements(least: int, most: int) -> list[tuple[int, int]]:
    """List columns and rows of so many tiles, fewest tiles first and then fewest columns."""
    sides = range(1, most + 1)
    shapes = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])


def _max_tiles_settings(values: Values, _: Size) -> range:
    return range(int(values["max_patches"]) - 1, 0, -1)


def _max_tiles(values: Values) -> int:
    return int(values["max_patches"])


def _max_tiles_keywords(_: Values, setting: int) -> dict[str, Any]:
    return {"max_patches": setting}


def qwen_grid(values: Values, image: Size, max_pixels: int) -> Seen:
    """Tell the grid of Qwen-VL's images: sides in whole tokens, so that the area lies between two numbers of pixels.

    Raises:
        ValueError: an image more than 200 times as long as it is wide.
    """
    return _within_area(image, _token_pixels(values), _min_pixels(values, max_pixels), max_pixels)


def glm4v_grid(values: Values, image: Size, max_pixels: int) -> Seen:
    """Tell the grid of GLM-4V's images: as Qwen-VL's, but a tiny image grows first, and pixels count once per frame.

    Raises:
        ValueError: as `qwen_grid`.
    """
    side, frames = _token_pixels(values), int(values["temporal_patch_size"])
    if min(image) < side:
        scale = max(side / image[0], side / image[1])
        image = int(image[0] * scale), int(image[1] * scale)
    return _within_area(image, side, _min_pixels(values, max_pixels) / frames, max_pixels / frames)


def _within_area(image: Size, side: int, min_pixels: float, max_pixels: float) -> Seen:
    height, width = image
    if max(image) / min(image) > MOST_RATIO:
        raise ValueError(f"an image of {height} x {width} pixels is more than {MOST_RATIO} times as long as it is wide")
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
    elif rows * columns * side**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
    return Seen(1, (rows, columns))


def _token_pixels(values: Values) -> int:
    """Return the side of a soft token in pixels."""
    return int(values["patch_size"]) * int(values["merge_size"])


def _min_pixels(values: Values, max_pixels: int) -> int:
    """Return the least area: the processor's own, unless an image is to have less."""
    return min(int(values["size"]["shortest_edge"]), max_pixels)


def _qwen_settings(values: Values, _: Size) -> range:
    """List areas of whole tokens."""
    return _areas(values, frames=1)


def _glm4v_settings(values: Values, _: Size) -> range:
    return _areas(values, frames=int(values["temporal_patch_size"]))


def _areas(values: Values, frames: int) -> range:
    token = frames * _token_pixels(values) ** 2
    return range((_longest_edge(values) - 1) // token * token, 0, -token)


def gemma4_grid(values: Values, image: Size, max_tokens: int) -> Seen:
    """Tell the grid of Gemma 4's images: as large as so many tokens allow, sides rounded down; small images grow."""
    (height, width), kernel, patch = image, int(values["pooling_kernel_size"]), int(values["patch_size"])
    side = kernel * patch
    factor = math.sqrt(max_tokens * kernel**2 * patch**2 / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    if rows == 0:
        return Seen(1, (1, min(width // height, max_tokens)))
    if columns == 0:
        return Seen(1, (min(height // width, max_tokens), 1))
    return Seen(1, (rows, columns))


def _gemma4_settings(values: Values, _: Size) -> list[int]:
    return [tokens for tokens in GEMMA4_TOKENS if tokens < int(values["max_soft_tokens"])]


def pixtral_grid(values: Values, image: Size, longest_edge: int) -> Seen:
    """Tell the grid of Mistral 3's images: made no longer than so many pixels, and then up to whole tokens.

    Raises:
        ValueError: an image so thin that nothing would be left of it.
    """
    (height, width), side = image, _cell_pixels(values)
    ratio = max(image) / longest_edge
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    if not height or not width:
        raise ValueError(f"of an image of {image[0]} x {image[1]} pixels nothing is left at {longest_edge} pixels")
    return Seen(1, ((height - 1) // side + 1, (width - 1) // side + 1))


def _pixtral_settings(values: Values, image: Size) -> range:
    """List whole numbers of tokens along the longer side, as long as the shorter one has a pixel."""
    side, most_ratio = _cell_pixels(values), max(image) / min(image)
    fewest = math.ceil(most_ratio / side)
    return range((_longest_edge(values) - 1) // side * side, (fewest - 1) * side, -side)


def _cell_pixels(values: Values) -> int:
    """Return the side of a soft token in pixels, by what Pixtral's processor hands to its image processor."""
    return int(values["patch_size"]) * int(values["spatial_merge_size"])


def _longest_edge(values: Values) -> int:
    return int(values["size"]["longest_edge"])


def _edge_keywords(_: Values, setting: int) -> dict[str, Any]:
    return {"size": {"longest_edge": setting}}


def _area_keywords(values: Values, setting: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": _min_pixels(values, setting), "longest_edge": setting}}


_IDEFICS = ResizingKind(idefics_tiles, _idefics_settings, _longest_edge, _edge_keywords)
_INTERNVL = ResizingKind(internvl_tiles, _max_tiles_settings, _max_tiles, _max_tiles_keywords)
_QWEN = ResizingKind(qwen_grid, _qwen_settings, _longest_edge, _area_keywords, is_monotone=True)
_GLM4V = ResizingKind(glm4v_grid, _glm4v_settings, _longest_edge, _area_keywords, is_monotone=True)
RESIZING: dict[str, ResizingKind] = {
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _INTERNVL,
    "aya_vision": _INTERNVL,
    "cohere2_vision": ResizingKind(cohere_tiles, _max_tiles_settings, _max_tiles, _max_tiles_keywords),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "glm4v": _GLM4V,
    "glm4v_moe": _GLM4V,
    "gemma4": ResizingKind(
        gemma4_grid,
        _gemma4_settings,
        default=lambda values: int(values["max_soft_tokens"]),
        keywords=lambda _, setting: {"max_soft_tokens": setting},
    ),
    "mistral3": ResizingKind(pixtral_grid, _pixtral_settings, _longest_edge, _edge_keywords, is_monotone=True),
}
"""By the `model_type` of the host's config; the others see images at one size."""
