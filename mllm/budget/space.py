"""Counts how many soft tokens each medium may use: the space a model was trained on, and exact counting.

Knows numbers only: extents (frames, grids), amounts, and the counting rules of the compressors. How a budget is written
is in `budget/grammar.py`, how images are cut in `budget/tiling.py`, and `config/space.py` makes a space of a config.
Does not know torch, files, tokenizers or weights. A budget is exact or refused; nothing here rounds.
What a training step samples from a space is in `budget/sampler.py`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from mllm.budget.grammar import MEDIA, Amount, Budget
from mllm.budget.nesting import haar_grids
from mllm.budget.resolution import Resizing, Resolution
from mllm.budget.tiling import Size, Tiles, Tiling, largest_map, map_of

Compression = Literal["query", "pool", "stack", "hybrid"]
NONE = Amount("none")
"""Leaves a medium out of a request."""


@dataclass(frozen=True)
class Extent:
    """Holds what is known of one medium before it is compressed: a grid (H, W) of patches, or frames on a clock.

    An image that may be cut into tiles also has its own size and that of a tile, in pixels; a video whose frames are
    images has the grid of each, and how many were taken from the file. An image that a host's own processor cuts has
    the grid of a tile and the number of them by default, and its own size, of which other resolutions follow.
    """

    medium: str
    grid: tuple[int, int] | None = None
    num_frames: int = 0
    frames_per_second: float | None = None
    image_pixels: Size | None = None
    tile_pixels: Size | None = None
    num_images: int = 1

    @property
    def length(self) -> int:
        """Features the encoder gives: patches of the grid (of one tile or frame), or frames."""
        return self.grid[0] * self.grid[1] if self.grid else self.num_frames


@dataclass(frozen=True)
class TokenCount:
    """Holds the exact soft tokens of one medium, and the rate they come from (0 where the budget names a count).

    0 tokens leave the medium out: its encoder's features are not shown, and only the tokens around its span stay.
    Where it is several encoded images, `each` are the tokens of one of them, and either `tiles` says how the image
    is cut, `frames` how many are shown of the video, or `pieces` how many a host's own processor has made of an image.
    Where all tiles are pooled as one map, `each` are those of the thumbnail, and `map_tokens` those of the map.
    `resolution` is that of an image which its host is to see smaller than by default.
    """

    tokens: int
    rate: int = 0
    each: int = 0
    tiles: Tiles | None = None
    frames: int = 0
    pieces: int = 0
    resolution: Resolution | None = None
    map_tokens: int = 0

    @property
    def amount(self) -> Amount:
        """What was asked of each encoded item."""
        if not self.tokens:
            return NONE
        return (
            Amount("rate", Fraction(self.rate)) if self.rate else Amount("tokens", Fraction(self.each or self.tokens))
        )

    @property
    def num_images(self) -> int:
        """Encoded images that are shown."""
        return self.tiles.num_images if self.tiles else self.frames or self.pieces or 1

    @property
    def item_tokens(self) -> list[int]:
        """The soft tokens of each encoded item that is shown: of the map alone where its tiles are pooled as one."""
        if self.map_tokens:
            return [self.each, self.map_tokens]
        return [self.each or self.tokens] * self.num_images


@dataclass(frozen=True)
class MediumSpace:
    """Holds the budgets one medium was trained on, largest first, and how its compressor counts.

    `between` allows amounts that were not trained; reports mark them. `max_tokens` is the number of queries (per
    window on a stream) or a hybrid compressor's largest count, `window_frames` the window of a query compressor on a
    stream. With `order` haar a grid has only the counts of whole maps, see `haar_grids`. `tiling` says how images are
    cut; `frame_counts` are the trained numbers of frames of a video whose frames are images, largest first. `resizing`
    tells how images are seen smaller, where they can be. With `whole_maps` the pooled tokens of an image form a map of
    equal rows: a count that forms none is refused, and a rate gives the largest map within it. With `with_none`
    requests were also trained without the medium, where they hold another one; `trained` does not list that.
    """

    medium: str
    compressor: Compression
    trained: tuple[Amount, ...]
    max_tokens: int = 0
    window_frames: int = 0
    between: bool = True
    order: Literal["raster", "haar"] = "raster"
    tiling: Tiling | None = None
    frame_counts: tuple[int, ...] = ()
    resizing: Resizing | None = None
    with_none: bool = False
    whole_maps: bool = False

    @property
    def choices(self) -> tuple[Amount, ...]:
        """The trained amounts, largest first, and that it is left out where this was trained too."""
        return (*self.trained, NONE) if self.with_none else self.trained

    def allowed(self) -> str:
        """List the amounts a user may ask for, in words, for messages and `--help`."""
        trained = ", ".join(str(amount) for amount in self.choices)
        return f"{trained} (trained)" if not self.between else f"{trained} (trained) and what lies between them"

    def is_trained(self, amount: Amount) -> bool:
        """Say whether training sampled this very amount; `max` always is."""
        return amount.kind == "max" or all(one in self.choices for one in amount.items or (amount,))

    def is_trained_count(self, count: TokenCount) -> bool:
        """Say whether training sampled this count. Cuts into tiles differ by image, so they are not compared."""
        return self.is_trained(count.amount) and (not self.frame_counts or count.frames in self.frame_counts)

    def count(
        self,
        amount: Amount,
        extent: Extent,
        *,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        max_image_tokens: int | None = None,
    ) -> TokenCount:
        """Counts the soft tokens of one medium at an amount, exactly.

        Args:
            max_tiles: of an image; as many as `tiling` allows when left out.
            num_frames: shown of a video whose frames are images; all when left out.
            max_image_tokens: that an image is to have before it is pooled; see `resizing`.

        Raises:
            ValueError: the amount cannot be met exactly; the message names what can.
        """
        if amount == NONE:
            self.check_none()
            return TokenCount(0)
        chosen = self.trained[0] if amount.kind == "max" else amount
        if chosen.kind == "per_second":
            chosen = self._rate_of(chosen, extent)
        if not self.between and chosen not in self.trained:
            raise ValueError(f"{self.medium}={amount} was not trained and this model serves only: {self.allowed()}")
        if extent.grid is None:
            return self._count_stream(chosen, extent)
        resolution = self.resolution_of(extent, max_image_tokens)
        if self.tiling is not None and resolution is not None:  # a host sees fewer tiles then
            max_tiles = resolution.setting
        if resolution is not None and resolution.grid is not None:
            extent = replace(extent, grid=resolution.grid)
        one = self._count_grid(chosen, extent)
        if self.frame_counts:
            return self._count_frames(one.tokens, extent, num_frames)
        if self.tiling is None:
            return _count_pieces(one, extent, resolution)
        return replace(self._count_tiles(self.tiling, one.tokens, extent, max_tiles), resolution=resolution)

    def check_none(self) -> None:
        """Refuse to leave the medium out where training never did.

        Raises:
            ValueError: with what was trained.
        """
        if not self.with_none:
            raise ValueError(
                f"{self.medium}=none cannot be met: this model was not trained without {self.medium}; it serves "
                f"{self.allowed()}"
            )

    def resolution_of(self, extent: Extent, max_image_tokens: int | None) -> Resolution | None:
        """Choose how an image is seen: None is as its processor does by default.

        Raises:
            ValueError: nothing keeps to so many tokens.
        """
        if max_image_tokens is None:
            return None
        assert self.resizing is not None
        assert extent.image_pixels is not None
        chosen = self.resizing.at_most(extent.image_pixels, max_image_tokens)
        return None if chosen.setting is None else chosen

    def _count_tiles(self, tiling: Tiling, each: int, extent: Extent, max_tiles: int | None) -> TokenCount:
        image, tile, grid = extent.image_pixels, extent.tile_pixels, extent.grid
        assert image is not None
        assert tile is not None
        assert grid is not None
        tiles = tiling.choose(image, tile, max_tiles)
        try:
            tokens = tiling.num_tokens(tiles, each, image=image, tile=tile, grid=grid)
        except ValueError as error:
            raise ValueError(f"{self.medium}={each} cannot be met: {error}") from error
        map_tokens = tiling.map_tokens(tiles, each, image=image, grid=grid)
        return TokenCount(tokens, each=each, tiles=tiles, map_tokens=map_tokens)

    def _count_frames(self, each: int, extent: Extent, num_frames: int | None) -> TokenCount:
        shown = extent.num_images if num_frames is None else num_frames
        if extent.num_images % shown:
            allowed = ", ".join(str(n) for n in range(1, extent.num_images + 1) if extent.num_images % n == 0)
            raise ValueError(
                f"frames={shown} cannot be met: {extent.num_images} frames were taken from the video; "
                f"allowed are {allowed}"
            )
        return TokenCount(shown * each, each=each, frames=shown)

    def _rate_of(self, amount: Amount, extent: Extent) -> Amount:
        if extent.frames_per_second is None:
            raise ValueError(f"{self.medium}={amount}: tokens per second need a stream, and this is a grid")
        rate = Fraction(extent.frames_per_second) / amount.value
        if rate.denominator != 1:
            clock = Fraction(extent.frames_per_second)
            near = sorted({clock / int(rate), clock / (int(rate) + 1)} if rate > 1 else {clock})
            raise ValueError(
                f"{self.medium}={amount} is not a whole number of frames per token at {float(clock):g} frames/s; "
                f"nearest: {', '.join(f'{float(value):g}/s' for value in near)}"
            )
        return Amount("rate", rate)

    def _count_grid(self, amount: Amount, extent: Extent) -> TokenCount:
        most = self.max_tokens if self.compressor in ("query", "hybrid") else extent.length
        if amount.kind == "rate" and self.trained[0].kind == "rate":
            return self._count_grid_at_rate(int(amount.value), extent)
        if amount.kind != "tokens" or amount.value > most:
            raise ValueError(f"{self.medium}={amount} cannot be met: allowed are counts 1..{most}; {self.allowed()}")
        if self.order == "haar":
            assert extent.grid is not None
            counts = [rows * columns for rows, columns in haar_grids(extent.grid)]
            if amount.value not in counts:
                whole = ", ".join(map(str, counts))
                raise ValueError(f"{self.medium}={amount} is no whole grid in Haar order: allowed are counts {whole}")
        if self.whole_maps:
            assert extent.grid is not None
            try:
                map_of(int(amount.value), extent.grid)
            except ValueError as error:
                raise ValueError(f"{self.medium}={amount} cannot be met: {error}") from error
        return TokenCount(int(amount.value))

    def _count_grid_at_rate(self, rate: int, extent: Extent) -> TokenCount:
        """Count tokens of an image that keeps its shape, of so many features each; a remainder makes them larger."""
        if extent.length < rate:
            raise ValueError(
                f"{self.medium}=/{rate}: an image of {extent.length} features is too small, it would leave no token"
            )
        tokens = extent.length // rate
        if self.whole_maps:
            assert extent.grid is not None
            tokens = largest_map(tokens, extent.grid)
        return TokenCount(tokens, rate)

    def _count_stream(self, amount: Amount, extent: Extent) -> TokenCount:
        frames, value = extent.num_frames, int(amount.value)
        if amount.kind == "rate" and self.compressor == "query":
            if self.window_frames % value or self.window_frames // value > self.max_tokens:
                rates = [
                    f"/{rate}"
                    for rate in range(1, self.window_frames + 1)
                    if self.window_frames % rate == 0 and self.window_frames // rate <= self.max_tokens
                ]
                raise ValueError(f"{self.medium}={amount} cannot be met: allowed are {', '.join(rates)}")
            return TokenCount(-(-frames // self.window_frames) * (self.window_frames // value), value)
        if amount.kind == "rate":
            if frames < value:
                raise ValueError(
                    f"{self.medium}={amount}: a clip of {frames} frames is too short, it would leave no token"
                )
            return TokenCount(frames // value, value)
        if self.compressor != "pool":
            raise ValueError(f"{self.medium}={amount}: a {self.compressor} compressor on a stream serves rates only")
        if value > frames:
            raise ValueError(f"{self.medium}={amount}: a clip of {frames} frames cannot give more tokens than frames")
        return TokenCount(value)


def _count_pieces(one: TokenCount, extent: Extent, resolution: Resolution | None) -> TokenCount:
    """Counts all that a host makes of an image, each encoded image as one."""
    pieces = extent.num_images if resolution is None else resolution.num_images
    if pieces == 1:
        return replace(one, resolution=resolution)
    return TokenCount(pieces * one.tokens, each=one.tokens, pieces=pieces, resolution=resolution)


@dataclass(frozen=True)
class Space:
    """Holds the budgets a model was trained on, by medium."""

    media: Mapping[str, MediumSpace]

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """The numbers of frames training chooses from, largest first; none where there is no choice."""
        counts = self.media["video"].frame_counts if "video" in self.media else ()
        return counts if len(counts) > 1 else ()

    def resized_by(self, resizing: Resizing | None) -> "Space":
        """Return the space of a model whose images can be seen smaller; None changes nothing."""
        if resizing is None:
            return self
        return Space({**self.media, "image": replace(self.media["image"], resizing=resizing)})

    def largest(self) -> Budget:
        """Return every medium at its most tokens."""
        frames = next(iter(self.frame_counts), None)
        return Budget({medium: space.trained[0] for medium, space in self.media.items()}, num_frames=frames)

    def smallest(self) -> Budget:
        """Return every medium at its fewest tokens; none of them is left out."""
        frames = next(reversed(self.frame_counts), None)
        return Budget({medium: space.trained[-1] for medium, space in self.media.items()}, num_frames=frames)

    def is_trained(self, budget: Budget) -> bool:
        """Say whether every amount the budget names was sampled in training; reports mark the others."""
        frames = self.media["video"].frame_counts if "video" in self.media else ()
        if budget.num_frames not in (None, *frames):
            return False
        return all(m in self.media and self.media[m].is_trained(a) for m, a in budget.amounts.items())

    def check(self, budget: Budget) -> None:
        """Refuse a budget that speaks of what the model does not have.

        Raises:
            ValueError: a medium, tiles, frames or smaller images of a model without them, or a medium to be left out
                that training never did; what there is is named.
        """
        for medium in budget.media:
            if medium not in self.media:
                allowed = ", ".join(self.media) or "text only"
                raise ValueError(f"this model does not take {medium}; it takes {allowed}")
        for medium, amount in budget.amounts.items():
            if NONE in (amount, *amount.items):
                self.media[medium].check_none()
        if budget.max_tiles is not None and self.media["image"].tiling is None:
            raise ValueError(f"tiles<={budget.max_tiles}: this model does not cut images into tiles")
        if budget.max_tiles is not None and self.media["image"].resizing is not None:
            raise ValueError(
                f"tiles<={budget.max_tiles}: the host of this model cuts images as it does; image<=N lets it see fewer "
                "tiles"
            )
        if budget.num_frames is not None and not self.media["video"].frame_counts:
            raise ValueError(f"frames={budget.num_frames}: the videos of this model are not frames of images")
        if budget.max_image_tokens is not None and self.media["image"].resizing is None:
            raise ValueError(
                f"image<={budget.max_image_tokens}: this model sees no image smaller; image=N pools what it sees"
            )


def count_tokens(extents: Sequence[Extent], budget: Budget, space: Space) -> list[TokenCount]:
    """Count the exact soft tokens of every medium of one request, in order. The only place where tokens are counted.

    Under `total<=N`, media that the budget does not name may take any of their trained amounts, images any cap on
    tiles (up to that of the budget) and videos of images any frames they can show (unless it names them), all items
    of a medium the same. The split with the most tokens wins; between equals the one that favours image, then audio,
    then video, and then the one with more tiles and frames.

    Raises:
        ValueError: a medium the model does not take, an amount that cannot be met, a cap that nothing meets, a budget
            that leaves all media out, or one that has not been resolved.
    """
    if budget.is_open:
        raise ValueError(
            f"budget {str(budget)!r} says no amounts; it is resolved for one request at a time, where questions are "
            "answered"
        )
    for extent in extents:
        _check_medium(extent, space)
    space.check(budget)
    if budget.total_tokens is not None:
        return _best_split(extents, budget, space)
    counts = _counts_of(extents, budget, space)
    if counts and not any(count.tokens for count in counts):
        raise ValueError(f"{budget} leaves nothing to answer about: the request holds no other medium; name an amount")
    return counts


def choices_of(extent: Extent, budget: Budget, space: Space) -> list[TokenCount]:
    """List what one medium may take under a cap, each count once: its trained amounts unless the budget names one.

    Raises:
        ValueError: a medium the model does not take, or an amount that cannot be met.
    """
    _check_medium(extent, space)
    return list(dict.fromkeys(counts[0] for counts in _choices([extent], budget, space)))


def _check_medium(extent: Extent, space: Space) -> None:
    if extent.medium not in space.media:
        allowed = ", ".join(space.media) or "text only"
        raise ValueError(f"this model does not take {extent.medium}; it takes {allowed}")


def _counts_of(extents: Sequence[Extent], budget: Budget, space: Space) -> list[TokenCount]:
    """Count every medium at what the budget names, item by item where it names several amounts of a medium.

    Raises:
        ValueError: an amount that cannot be met, or another number of items than the budget names.
    """
    budgets = budget.by_item([extent.medium for extent in extents])
    return [_count_of(extent, one, space) for extent, one in zip(extents, budgets, strict=True)]


def _count_of(extent: Extent, budget: Budget, space: Space) -> TokenCount:
    medium_space = space.media[extent.medium]
    return medium_space.count(
        budget.amounts.get(extent.medium, Amount("max")),
        extent,
        max_tiles=budget.max_tiles,
        num_frames=budget.num_frames,
        max_image_tokens=budget.max_image_tokens if extent.medium == "image" else None,
    )


def _best_split(extents: Sequence[Extent], budget: Budget, space: Space) -> list[TokenCount]:
    present = [medium for medium in MEDIA if any(extent.medium == medium for extent in extents)]
    by_medium = {m: _choices([e for e in extents if e.medium == m], budget, space) for m in present}
    best: dict[str, list[TokenCount]] | None = None
    best_key: tuple[int, ...] = ()
    smallest = 0
    for split in itertools.product(*by_medium.values()):
        sums = [sum(count.tokens for count in counts) for counts in split]
        if not any(sums):
            continue  # all media left out
        smallest = min(smallest or sum(sums), sum(sums))
        key = (sum(sums), *sums, *(sum(count.num_images for count in counts) for counts in split))
        if sum(sums) <= (budget.total_tokens or 0) and key > best_key:
            best, best_key = dict(zip(present, split, strict=True)), key
    if not extents:
        return []
    if best is None:
        raise ValueError(f"{budget} cannot be met: the smallest split of this request takes {smallest} tokens")
    queues = {medium: iter(counts) for medium, counts in best.items()}
    return [next(queues[extent.medium]) for extent in extents]


def _choices(extents: list[Extent], budget: Budget, space: Space) -> list[list[TokenCount]]:
    """Counts one medium's items at every amount it may take, except trained amounts its clips are too short for."""
    medium = extents[0].medium
    medium_space = space.media[medium]
    named = budget.amounts.get(medium)
    choices, refusals = [], []
    for amount in medium_space.choices if named is None else (named,):
        for change in _changes(extents, budget, medium_space):
            one_amount = replace(budget, amounts={medium: amount}, **change)
            try:
                choices.append(_counts_of(extents, one_amount, space))
            except ValueError as error:
                refusals.append(error)
    if not choices:
        raise refusals[0]
    return choices


def _changes(extents: Sequence[Extent], budget: Budget, space: MediumSpace) -> Iterator[dict[str, int]]:
    """The caps on tiles, or the frames, that a medium's items may take under `total<=`; one empty change otherwise."""
    if space.tiling is not None and space.resizing is None:
        caps: set[int] = set()
        for extent in extents:
            assert extent.image_pixels is not None
            assert extent.tile_pixels is not None
            caps.update(space.tiling.choices(extent.image_pixels, extent.tile_pixels, budget.max_tiles))
        yield from ({"max_tiles": cap} for cap in sorted(caps, reverse=True))
    elif space.frame_counts and budget.num_frames is None:
        most = min(extent.num_images for extent in extents)
        shared = (n for n in range(most, 0, -1) if all(extent.num_images % n == 0 for extent in extents))
        yield from ({"num_frames": count} for count in shared)
    else:
        yield {}
