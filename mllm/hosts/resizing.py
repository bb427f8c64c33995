"""Tells at which resolutions a host's processor can see an image, and what each costs, of the image's size alone.

Knows image processors by the plain values they are saved as, and sizes. Does not know images or weights.

There is one function per way of resizing. It tells how many encoded images a setting makes, and must say what the
processor itself does: a tile more or less and the prompt has other placeholders than the image has features. Smaller
settings than its default are tried from the largest down, so a larger cap never sees less than a smaller one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mllm.budget.resolution import Resolution
from mllm.budget.tiling import Size

MAX_EDGE_PIXELS = 4096
"""Idefics3's processor and those after it make no image longer than this."""


@dataclass(frozen=True)
class ResizingKind:
    """Describes a way of resizing.

    Args:
        num_images: encoded images of an image of height and width at a setting, by the processor's plain values.
        settings: smaller ones than the default, from the largest down, by the same values.
        default: the setting that those values mean.
        keywords: what makes the processor take a setting.
    """

    num_images: Callable[[Mapping[str, Any], Size, int], int]
    settings: Callable[[Mapping[str, Any]], range]
    default: Callable[[Mapping[str, Any]], int]
    keywords: Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class HostResizing:
    """Chooses resolutions of a host's images. Implements `mllm.budget.resolution.Resizing`.

    Args:
        kind: of `RESIZING`.
        values: plain values of the image processor.
        tokens: of one encoded image at the full budget.
    """

    kind: ResizingKind
    values: Mapping[str, Any]
    tokens: int

    def default(self, image: Size) -> Resolution:
        """Return what the processor does unless it is told otherwise."""
        return self._at(image, self.kind.default(self.values), is_default=True)

    def at_most(self, image: Size, max_tokens: int) -> Resolution:
        """Return the first resolution, from the default down, of at most so many tokens.

        Raises:
            ValueError: none has so few; the message names the smallest.
        """
        smallest = self.default(image)
        if smallest.tokens <= max_tokens:
            return smallest
        for setting in self.kind.settings(self.values):
            resolution = self._at(image, setting)
            if resolution.tokens <= max_tokens:
                return resolution
            smallest = min(smallest, resolution, key=lambda one: one.tokens)
        height, width = image
        raise ValueError(
            f"image<={max_tokens} cannot be met: an image of {height} x {width} pixels takes at least "
            f"{smallest.tokens} tokens before it is pooled; image=N pools them"
        )

    def keywords(self, setting: int | None) -> dict[str, Any]:
        """Return what the processor is called with for a setting of a resolution."""
        return {} if setting is None else self.kind.keywords(setting)

    def _at(self, image: Size, setting: int, *, is_default: bool = False) -> Resolution:
        num_images = self.kind.num_images(self.values, image, setting)
        return Resolution(None if is_default else setting, num_images, num_images * self.tokens)


def resizing_of(model_type: str, values: Mapping[str, Any], tokens: int) -> HostResizing | None:
    """Return how a host's images are resized; None where they are seen at one size.

    Args:
        values: plain values of its image processor.
        tokens: of one encoded image at the full budget.
    """
    kind = RESIZING.get(model_type)
    return None if kind is None else HostResizing(kind, values, tokens)


def idefics_images(values: Mapping[str, Any], image: Size, longest_edge: int) -> int:
    """Count the tiles of Idefics3 and SmolVLM: the image is made so long, and cut into squares, the whole behind them.

    The image becomes a rectangle of whole squares first, so that it loses its shape a little.
    """
    height, width = image
    tile = int(values["max_image_size"]["longest_edge"])
    if not values.get("do_image_splitting", True):
        return 1
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
    return 1 if max(height, width) <= tile else (height // tile) * (width // tile) + 1


def _even(pixels: int) -> int:
    return pixels + pixels % 2


def _within_max_edge(height: int, width: int) -> Size:
    ratio = width / height
    if width >= height and width > MAX_EDGE_PIXELS:
        return max(int(MAX_EDGE_PIXELS / ratio), 1), MAX_EDGE_PIXELS
    if height > width and height > MAX_EDGE_PIXELS:
        return MAX_EDGE_PIXELS, max(int(MAX_EDGE_PIXELS * ratio), 1)
    return height, width


def _idefics_settings(values: Mapping[str, Any]) -> range:
    """List whole numbers of tiles along the longer side, which is where the count changes."""
    tile = int(values["max_image_size"]["longest_edge"])
    default = int(values["size"]["longest_edge"])
    return range((default - 1) // tile * tile, 0, -tile)


def internvl_images(values: Mapping[str, Any], image: Size, max_tiles: int) -> int:
    """Count the tiles of InternVL and Aya Vision: the arrangement nearest to the image's ratio, and the whole behind.

    Of arrangements that are as near, the later one counts if it is not twice as large as the image.
    """
    if max_tiles == 1:
        return 1
    (height, width), least = image, int(values["min_patches"])
    tile_area = int(values["size"]["height"]) * int(values["size"]["width"])
    nearest, best = math.inf, (1, 1)
    for columns, rows in _arrangements(least, max_tiles):
        distance = abs(width / height - columns / rows)
        is_no_larger = height * width > 0.5 * tile_area * columns * rows
        if distance < nearest or (distance == nearest and is_no_larger):
            nearest, best = distance, (columns, rows)
    num_tiles = best[0] * best[1]
    return num_tiles + 1 if num_tiles > 1 else 1


def cohere_images(values: Mapping[str, Any], image: Size, max_tiles: int) -> int:
    """Count the tiles of Cohere's vision models: the arrangement that enlarges least, or else shrinks least."""
    (height, width), tile = image, int(values["size"]["height"])
    scales = [
        (min(columns * tile / width, rows * tile / height), columns * rows)
        for columns, rows in _arrangements(1, max_tiles)
    ]
    enlarging = [(scale, number) for scale, number in scales if scale >= 1]
    # `min` and `max` take the first of equals, as the processor does.
    _, num_tiles = min(enlarging, key=_scale) if enlarging else max(scales, key=_scale)
    return num_tiles + 1 if num_tiles > 1 else 1


def _scale(scaled: tuple[float, int]) -> float:
    return scaled[0]


def _arrangements(least: int, most: int) -> list[tuple[int, int]]:
    """List columns and rows of so many tiles, fewest tiles first and then fewest columns."""
    sides = range(1, most + 1)
    shapes = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])


def _max_tiles_settings(values: Mapping[str, Any]) -> range:
    return range(int(values["max_patches"]) - 1, 0, -1)


def _max_tiles(values: Mapping[str, Any]) -> int:
    return int(values["max_patches"])


def _max_tiles_keywords(setting: int) -> dict[str, Any]:
    return {"max_patches": setting}


_IDEFICS = ResizingKind(
    idefics_images,
    _idefics_settings,
    default=lambda values: int(values["size"]["longest_edge"]),
    keywords=lambda setting: {"size": {"longest_edge": setting}},
)
_INTERNVL = ResizingKind(internvl_images, _max_tiles_settings, _max_tiles, _max_tiles_keywords)
RESIZING: dict[str, ResizingKind] = {
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _INTERNVL,
    "aya_vision": _INTERNVL,
    "cohere2_vision": ResizingKind(cohere_images, _max_tiles_settings, _max_tiles, _max_tiles_keywords),
}
"""By the `model_type` of the host's config; the others see images at one size."""
