"""Tiles of images: the choice and the order are LLaVA-NeXT's, the counts are those of what is built, caps hold."""

from types import SimpleNamespace
from typing import Any

import blocks
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mllm.budget import Budget, Extent, Space, TokenCount, count_tokens
from mllm.budget.tiling import LLAVA_NEXT, Tiles, Tiling, map_of, pooled_rows
from mllm.compressors.area_pooling import grid_rows
from mllm.processing.token_order import NEWLINE, order_of, shown_items
from mllm.transforms.image_tiles import cut

TILE = (336, 336)
GRID = (24, 24)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
IMAGES = [
    (480, 640),
    (640, 480),
    (1000, 300),
    (300, 1000),
    (337, 1008),
    (200, 90),
    (672, 672),
    (2000, 1111),
]


def space(**tiling: Any) -> Space:
    return blocks.space(
        image={"compressor": "pool", "budgets": [1, 9, 36, 144, 576], "tiling": tiling},
        audio={"compressor": "pool", "budgets": ["/4", "/8", "/16"]},
    )


def extent(size: tuple[int, int], grid: tuple[int, int] = GRID, tile: tuple[int, int] = TILE) -> Extent:
    return Extent("image", grid=grid, image_pixels=size, tile_pixels=tile)


@pytest.mark.parametrize("grid", [(24, 24), (8, 8), (7, 7), (16, 12), (5, 9)])
def test_grids_are_those_of_the_pooling(grid: tuple[int, int]) -> None:
    counts = torch.arange(1, grid[0] * grid[1] + 1)
    assert [pooled_rows(int(n), grid) for n in counts] == grid_rows(counts, grid).tolist()


def test_counts_without_a_map_are_refused_with_those_that_have_one() -> None:
    assert map_of(576, GRID) == (24, 24)
    assert map_of(25, GRID) == (5, 5)
    with pytest.raises(
        ValueError, match=r"^7 tokens of 24 x 24 features form no map of equal rows; the nearest .*6.*9"
    ):
        map_of(7, GRID)
    with pytest.raises(ValueError, match=r"image=7 cannot be met: 7 tokens of 24 x 24 features"):
        count_tokens([extent((480, 640))], Budget.parse("image=7"), space())


def test_the_best_size_is_the_one_of_transformers() -> None:
    rng = np.random.default_rng(0)
    sizes = [*IMAGES, *((int(h), int(w)) for h, w in rng.integers(20, 3000, (300, 2)))]
    free = Tiling(kind="free", max_tiles=9)
    for tiling in (Tiling(), Tiling(pinpoints=tuple(map(tuple, PINPOINTS))), free):
        resolutions = [(rows * 336, columns * 336) for rows, columns in tiling.shapes(TILE)]
        for size in sizes:
            height, width = select_best_resolution(size, resolutions)
            tiles = tiling.choose(size, TILE)
            best = (height // 336, width // 336)
            assert (tiles.rows, tiles.columns) == ((0, 0) if best == (1, 1) else best)
    assert [[rows * 336, columns * 336] for rows, columns in LLAVA_NEXT] == PINPOINTS


@pytest.mark.parametrize("each", [1, 9, 36, 144, 576])
@pytest.mark.parametrize("size", IMAGES)
def test_tokens_and_their_order_are_those_of_llava_next(size: tuple[int, int], each: int) -> None:
    """transformers packs features of every tile; ours say which feature stands where. Its side is the map's."""
    side = int(each**0.5)
    tiles = Tiling().choose(size, TILE)
    features = torch.arange(tiles.num_images * each, dtype=torch.float).view(tiles.num_images, each, 1)
    vision = SimpleNamespace(image_size=336, patch_size=336 // side)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS)
    newline = torch.tensor([-1.0])
    (packed,), lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        torch.tensor([size]),
        "full",
        newline,  # type: ignore[arg-type]
    )
    (cost,) = count_tokens([extent(size)], Budget.parse(f"image={each}"), space())
    order = order_of(extent(size), cost, Tiling())
    ours = torch.where(order[:, 0] == NEWLINE, -1, order[:, 0] * each + order[:, 1])
    assert cost.tokens == len(order)
    if not (packed[:, 0] >= each).any():
        assert (size, each) == ((200, 90), 1)  # a tall little image in wide tiles: they cut all of it off, we do not
        assert ours.tolist() == [0, 1, 2, -1]
        return
    assert ours.tolist() == packed[:, 0].long().tolist()
    assert cost.tokens == lengths.item()


def test_a_thumbnail_alone_ends_with_a_newline() -> None:
    (cost,) = count_tokens([extent((480, 640))], Budget.parse("image=9,tiles<=0"), space())
    assert cost == TokenCount(10, each=9, tiles=Tiles(0, 0, True))
    assert order_of(extent((480, 640)), cost, Tiling()).tolist() == [*([0, n] for n in range(9)), [NEWLINE, 0]]


def test_a_image_far_from_the_shape_of_its_tiles_does_not_vanish() -> None:
    only_square = space(pinpoints=[[672, 672]])
    (cost,) = count_tokens([extent((100, 1000))], Budget.parse("image=1"), only_square)
    assert cost.tokens == 1 + 2 * 3  # thumbnail, and both rows of the 2 x 2 map, since one of them is half of it
    (line,) = count_tokens([extent((1, 900))], Budget.parse("image=576"), space())
    assert line.tokens == 576 + 2 * (3 * 24 + 1)


def test_published_totals_are_those_of_five_images_without_unpadding() -> None:
    """LLaVA-NeXT-M3 names 2880, 720, 180, 45 and 5 tokens: 2 x 2 tiles and the thumbnail of a square image."""
    flat = space(merge="flat", newline=False)
    budgets = [Budget.parse(f"image={each}") for each in (576, 144, 36, 9, 1)]
    assert [count_tokens([extent((672, 672))], b, flat)[0].tokens for b in budgets] == [2880, 720, 180, 45, 5]
    whole = [count_tokens([extent((672, 672))], b, space())[0].tokens for b in budgets]
    assert whole == [2880 + 48, 720 + 24, 180 + 12, 45 + 6, 5 + 2]


def test_flat_tiles_stand_in_turn_with_a_newline_per_row() -> None:
    settings = {"compressor": {"kind": "query", "num_queries": 4}, "budgets": [2, 4], "tiling": {"merge": "flat"}}
    tiled = blocks.space(image=settings)
    (cost,) = count_tokens([extent((672, 672))], Budget.parse("image=3"), tiled)
    assert cost.tokens == 5 * 3 + 2
    order = order_of(extent((672, 672)), cost, tiled.media["image"].tiling).tolist()
    turn = [[piece, index] for piece in range(5) for index in range(3)]
    assert order == [*turn[:9], [-1, 0], *turn[9:], [-1, 0]]


@pytest.mark.parametrize("size", IMAGES)
def test_free_tiles_never_exceed_their_cap(size: tuple[int, int]) -> None:
    free = Tiling(kind="free", max_tiles=12)
    for cap in range(13):
        tiles = free.choose(size, TILE, cap)
        assert tiles.count <= cap
        assert tiles == free.choose(size, TILE, cap)
    assert free.choices(size, TILE)[0] == free.choose(size, TILE).count
    assert free.choices(size, TILE, 0) == [0]


def test_a_total_takes_the_most_tokens_and_then_the_most_tiles() -> None:
    """Against every cap and every trained amount, for one and for several images."""
    tiled = space(kind="free", max_tiles=6)
    rng = np.random.default_rng(1)
    for _ in range(25):
        extents = [extent((int(h), int(w))) for h, w in rng.integers(100, 2000, (rng.integers(1, 4), 2))]
        total = int(rng.integers(8, 4000))
        splits = []
        for cap in range(7):
            for each in (1, 9, 36, 144, 576):
                costs = count_tokens(extents, Budget.parse(f"image={each},tiles<={cap}"), tiled)
                splits.append((sum(c.tokens for c in costs), sum(c.num_images for c in costs), costs))
        best = max((split for split in splits if split[0] <= total), key=lambda split: split[:2])
        chosen = count_tokens(extents, Budget.parse(f"total<={total}"), tiled)
        assert (sum(c.tokens for c in chosen), sum(c.num_images for c in chosen)) == best[:2]
        capped = count_tokens(extents, Budget.parse(f"tiles<=2,total<={total}"), tiled)
        assert all(cost.tiles is not None and cost.tiles.count <= 2 for cost in capped)


def test_a_named_amount_leaves_the_tiles_to_the_total() -> None:
    (cost,) = count_tokens([extent((672, 672))], Budget.parse("image=144,total<=400"), space(kind="free", max_tiles=4))
    assert cost.each == 144
    assert cost.tiles == Tiles(0, 0, True)  # 1 x 1 would repeat it, and 2 tiles take 433 to 444
    with pytest.raises(ValueError, match="the smallest split of this request takes 145 tokens"):
        count_tokens([extent((672, 672))], Budget.parse("image=144,total<=100"), space(kind="free", max_tiles=4))


def test_images_share_a_total_with_audio() -> None:
    audio = Extent("audio", num_frames=100, frames_per_second=50.0)
    costs = count_tokens([extent((672, 672)), audio], Budget.parse("total<=80"), space())
    assert [cost.tokens for cost in costs] == [51, 25]


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"kind": "squares"}, "model.image.tiling.kind is 'squares'; allowed: pinpoints, free"),
        ({"merge": "add"}, r"model.image.tiling.merge: expected one of \['spatial_unpad', 'flat'\], got add"),
        ({"kind": "free"}, "model.image.tiling.max_tiles is missing"),
        ({"kind": "free", "max_tiles": 0}, "max_tiles is 0; it must be at least 1"),
        (
            {"kind": "free", "max_tiles": 4, "pinpoints": PINPOINTS},
            "model.image.tiling.pinpoints goes with kind pinpoints, not with free",
        ),
        ({"max_tiles": 2, "thumbnail": False}, "there is no thumbnail"),
        ({"tiles": 4}, "unknown key model.image.tiling.tiles; did you mean model.image.tiling.max_tiles"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(**tiling)


def test_a_merge_that_needs_a_map_refuses_queries_and_coarse_first_tokens() -> None:
    for settings in (
        {"compressor": {"kind": "query", "num_queries": 9}},
        {"compressor": {"kind": "pool", "order": "haar"}},
    ):
        with pytest.raises(ValueError, match=r"spatial_unpad needs tokens that form a grid.* allowed here: flat"):
            blocks.space(image={**settings, "budgets": [9], "tiling": {}})


def test_pinpoints_are_whole_tiles() -> None:
    with pytest.raises(ValueError, match=r"pinpoints holds \[336, 500\], which is not made of whole tiles"):
        count_tokens([extent((480, 640))], Budget.parse("image=9"), space(pinpoints=[[336, 500]]))


def test_a_cap_that_leaves_nothing_is_refused() -> None:
    bare = space(kind="pinpoints", thumbnail=False)
    with pytest.raises(ValueError, match="tiles<=1 leaves nothing of an image without a thumbnail; allowed from 2"):
        count_tokens([extent((480, 640))], Budget.parse("image=9,tiles<=1"), bare)
    plain = blocks.space(image={"budgets": [9]})
    with pytest.raises(ValueError, match="tiles<=1: this model does not cut images into tiles"):
        count_tokens([extent((480, 640))], Budget.parse("tiles<=1"), plain)


def test_pixels_of_the_tiles_are_those_of_llava_next() -> None:
    rng = np.random.default_rng(0)
    for size in ((50, 70), (100, 30), (64, 64), (21, 90)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        tiles = Tiling().choose(size, (32, 32))
        made = cut(image, [tiles], tile=(32, 32), thumbnail=True)
        square = {"height": 32, "width": 32}
        expected = CLIPImageProcessorPil(size=square, crop_size=square)(images=list(made), return_tensors="pt")
        pinpoints = [[side // 336 * 32 for side in point] for point in PINPOINTS]
        next_processor = LlavaNextImageProcessorPil(size=square, crop_size=square, image_grid_pinpoints=pinpoints)
        theirs = next_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(expected["pixel_values"], theirs[: tiles.num_images])


def test_cuts_of_one_image_share_the_thumbnail() -> None:
    tilings = (Tiles(2, 2, True), Tiles(1, 2, True))
    places = [shown_items(extent((480, 640)), TokenCount(9, each=9, tiles=tiles), tilings) for tiles in tilings]
    assert places == [[0, 1, 2, 3, 4], [0, 5, 6]]
    assert shown_items(extent((480, 640)), TokenCount(9, each=9, tiles=Tiles(0, 0, True)), tilings) == [0]
    with pytest.raises(ValueError, match="was loaded as 2x2, 1x2 and its budget cuts it into 1x3: load media with"):
        shown_items(extent((480, 640)), TokenCount(9, each=9, tiles=Tiles(1, 3, True)), tilings)
