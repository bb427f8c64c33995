"""Prepares media as their encoders want them: one item, an image in tiles, the stacks of a batch.

Knows tensors, tiles and budgets. Does not know files, tokenizers or encoders.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.budget import Budget, Extent, Space, count_tokens
from mllm.budget.resolution import Resizing, Resolution
from mllm.budget.tiling import Size, Tiles
from mllm.hosts.rows import RowBreaks, row_sizes
from mllm.media import MediaError
from mllm.transforms.encoder_inputs import ImageTransform, NotMouthCrops
from mllm.transforms.image_tiles import cut

LENGTH_KEYS = {"audio": "audio_lengths", "video": "video_lengths"}


@dataclass(frozen=True)
class HostView:
    """Holds how a host's prompt shows a medium item: its tags, with one placeholder per encoded image or clip.

    Args:
        ids: of the prompt.
        num_placeholders: among them.
        breaks: tokens of text behind the rows of an image, which are not among them.
        grid: of the features of an image that keeps its shape, where it was loaded at several resolutions.
        resolution: of an image that is seen smaller than by default.
        num_items: encoded for it.
    """

    ids: tuple[int, ...]
    num_placeholders: int = 1
    breaks: RowBreaks | None = None
    grid: Size | None = None
    resolution: Resolution | None = None
    num_items: int = 1

    def num_tags(self, tokens: int, grid: Size | None) -> int:
        """Count the tokens of text that stand between the soft ones, so many of a grid, and around them."""
        around = len(self.ids) - self.num_placeholders
        if self.breaks is None:
            return around
        assert grid is not None
        return around + len(row_sizes(grid, tokens))


@dataclass(frozen=True)
class LoadedMedia:
    """Holds one medium as its encoder wants it: values without a batch dimension, and the true raw length of a stream.

    Where it is several encoded images, values are (P, 3, h, w): of an image of `image_pixels` (height, width) the
    thumbnail and the tiles of every one of `tilings`; of a video its frames, and `encoded_as` names the medium whose
    encoder they want. `grid` is that of an image's patches where images keep their shape. Where a host reads all
    tiles as one map, values are (2, P, pixels of a tile), and `maps` are the sizes of the thumbnail and of the map; see
    `mllm.hosts.maps`.

    Of audio as it is to be answered about, `estimated_snr_db` says how noisy it sounds.

    Of a host, `views` say how its prompt shows the item, one for every resolution at which an image was loaded, their
    encoded images one after the other, and `tilings` those of each; `num_features` counts the features of a clip.
    """

    medium: str
    values: Tensor
    raw_length: int = 0
    grid: tuple[int, int] | None = None
    encoded_as: str = ""
    image_pixels: Size | None = None
    tilings: tuple[Tiles, ...] = ()
    views: tuple[HostView, ...] = ()
    num_features: int = 0
    estimated_snr_db: float | None = None
    maps: tuple[tuple[int, ...], ...] = ()

    @property
    def encoder(self) -> str:
        """Return the medium whose encoder this is for."""
        return self.encoded_as or self.medium

    @property
    def num_items(self) -> int:
        """Count the encoded items it makes."""
        return len(self.values) if self.encoder == "image" and self._is_stack else 1

    @property
    def _is_stack(self) -> bool:
        return self.values.ndim == 4 or (self.values.ndim == 3 and (len(self.views) > 1 or bool(self.maps)))

    @property
    def items(self) -> list[Tensor]:
        """List the values of its encoded items."""
        return list(self.values) if self._is_stack else [self.values]

    @property
    def grids(self) -> list[tuple[int, ...]]:
        """List the grids of its encoded items, where images keep their shape, with what else says how they are read."""
        own = [] if self.grid is None else [self.grid]
        return own or list(self.maps) or [view.grid for view in self.views if view.grid is not None]


def cuts_of(extents: Sequence[Extent], budgets: Sequence[Budget], space: Space) -> list[tuple[Tiles, ...]]:
    """List, for each medium item of a sample, the different cuts into tiles that budgets ask for; by default the most
    tiles.

    A budget that cannot be met asks for none; it is refused when it is counted for good.

    Raises:
        ValueError: none of the budgets can be met.
    """
    cuts: list[list[Tiles]] = [[] for _ in extents]
    held = {extent.medium for extent in extents}
    refusals = []
    for budget in budgets or (Budget(),):
        try:
            costs = count_tokens(extents, budget.only(held), space)
        except ValueError as error:
            refusals.append(error)
            continue
        for cuts_of_item, cost in zip(cuts, costs, strict=True):
            cuts_of_item += [cost.tiles] if cost.tiles is not None and cost.tiles not in cuts_of_item else []
    if not any(cuts):  # a budget that one image cannot meet may suit another; only if none suits any, it is an error
        raise refusals[0]
    return [tuple(cuts_of_item) for cuts_of_item in cuts]


def resolutions_of(resizing: Resizing, image_pixels: Size, budgets: Sequence[Budget]) -> list[Resolution]:
    """List the different resolutions at which budgets want an image to be seen; the default without any.

    A budget that cannot be met asks for none; it is refused when it is counted for good.

    Raises:
        ValueError: none of the budgets can be met.
    """
    resolutions: list[Resolution] = []
    refusals = []
    for most in dict.fromkeys(budget.max_image_tokens for budget in budgets or (Budget(),)):
        try:
            one = resizing.default(image_pixels) if most is None else resizing.at_most(image_pixels, most)
        except ValueError as error:
            refusals.append(error)
            continue
        resolutions += [one] if one not in resolutions else []
    if not resolutions:
        raise refusals[0]
    return resolutions


def cut_image(
    raw: Any, tilings: Sequence[Tiles], transform: ImageTransform, *, tile: Size, thumbnail: bool
) -> LoadedMedia:
    """Cut a decoded image in one or several ways, for its encoder.

    Args:
        tile: height and width of what the encoder reads, in pixels.
    """
    pixels = cut(raw, tilings, tile=tile, thumbnail=thumbnail, resample=transform.resample)
    image_pixels = (raw.height, raw.width)
    return LoadedMedia("image", transform.many(list(pixels)), image_pixels=image_pixels, tilings=tuple(tilings))


def as_long_as_longest(media: Sequence[Sequence[LoadedMedia]]) -> list[list[LoadedMedia]]:
    """Return the media of a batch, each clip as long as the longest of its medium: its padding counts as its own."""
    longest: dict[str, int] = {}
    for item in (item for items in media for item in items):
        longest[item.medium] = max(longest.get(item.medium, 0), item.raw_length)
    return [[replace(item, raw_length=longest[item.medium]) for item in items] for items in media]


def stack_media(items: Sequence[LoadedMedia]) -> dict[str, Tensor]:
    """Stack the encoder inputs of a batch: items of a medium in order, streams padded to the longest.

    Returns:
        `pixel_values` (N, 3, h, w), tiles and frames one after the other, or (N, P, values of a patch) with
        `image_grids` (N, 2) of images that keep their shape, (N, 6) of maps; `audio_values` (N, ...) and `video_values`
        (N, T, 1, h, w) with their `audio_lengths`, `video_lengths` (N,). Media that do not occur are left out.
    """
    out: dict[str, Tensor] = {}
    for medium, key in (("image", "pixel_values"), ("audio", "audio_values"), ("video", "video_values")):
        of_medium = [item for item in items if item.encoder == medium]
        # Tiles and frames are encoded images like any other, so images with and without tiles share one tensor.
        if any(item.values.ndim == 4 for item in of_medium) and medium == "image":
            out[key] = torch.cat([item.values.view(-1, *item.values.shape[-3:]) for item in of_medium])
        elif of_medium:
            values = [one for item in of_medium for one in (item.items if medium == "image" else [item.values])]
            out[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            if grids := [grid for item in of_medium for grid in item.grids]:
                out["image_grids"] = torch.tensor(grids)
        if of_medium and medium in LENGTH_KEYS:
            out[LENGTH_KEYS[medium]] = torch.tensor([item.raw_length for item in of_medium])
    return out


def refusal(error: ValueError, source: Path | str) -> MediaError:
    """Name what a transform has refused, a file or what stands in its place, and what to type if that mends it."""
    hint = ""
    if isinstance(error, NotMouthCrops):
        typed = shlex.quote(str(source)) if isinstance(source, Path) else "clip.mp4"
        hint = f"; cut such crops first: mllm prepare lips {typed} --out crops"
    return MediaError("unsupported", source, f"{error}{hint}")


class ItemNumbers:
    """Says which encoded item of a batch each medium (begins with): the next, or one that has the very same values."""

    def __init__(self) -> None:
        self.items: list[LoadedMedia] = []
        self._counts: dict[str, int] = {}
        self._known: dict[tuple[str, int, int], int] = {}

    def __call__(self, item: LoadedMedia) -> int:
        """Return the number of an item among those of its encoder."""
        # By identity, not by value: comparing pixels would cost more than encoding them twice. The length belongs to
        # the key because `as_long_as_longest` changes it without copying values.
        key = (item.medium, id(item.values), item.raw_length)
        if key in self._known:
            return self._known[key]
        self.items.append(item)
        number = self._known[key] = self._counts.get(item.encoder, 0)
        self._counts[item.encoder] = number + item.num_items
        return number
