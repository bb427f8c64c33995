"""Images whose tiles are read as one map: the sizes and features are the library's own, and pooled ones their means."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_hosts
import torch
import transformers as hf
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from mllm.budget import Budget, count_tokens
from mllm.budget.tiling import LLAVA_NEXT, Size, Tiling
from mllm.checkpoints import adoption
from mllm.compressors.area_pooling import average, item_grid_cover
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.hosts.maps import _map, map_items
from mllm.hosts.resizing import TilesResizing
from mllm.hosts.tiles import scaled_tiling
from mllm.processing.chat import RefusedConversation

TILE, GRID = (384, 384), (27, 27)
CONFIG = hf.LlavaOnevisionConfig(
    vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
    image_grid_pinpoints=[[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
)
"""The sizes of the released models."""
PROCESSOR = tiny_hosts.processor_class("llava_onevision")(
    image_processor=hf.LlavaOnevisionImageProcessorPil(image_grid_pinpoints=CONFIG.image_grid_pinpoints),
    tokenizer=tiny_hosts.tokenizer_of(tiny_hosts.HOSTS["llava_onevision"]),
    num_image_tokens=27 * 27,
    vision_feature_select_strategy="full",
)
SIZES = [
    (384, 384),
    (480, 640),
    (1080, 1920),
    (1920, 1080),
    (200, 90),
    (90, 2000),
    (2304, 2304),
    (1500, 1490),
    (3, 700),
]
"""Of one tile, of maps that are left as they are, of such that are scaled down, and very thin ones."""
FAMILIES = [pytest.param("llava_next", marks=pytest.mark.slow), "llava_onevision"]
SCALED = [(1080, 1920), (1920, 1080), (2304, 2304), (1500, 1490)]


@pytest.mark.parametrize("size", SIZES)
def test_a_map_has_the_size_and_the_features_that_the_library_gives_it(size: Size) -> None:
    tiling = scaled_tiling(CONFIG)
    tiles = tiling.choose(size, TILE)
    height, width = select_best_resolution(size, CONFIG.image_grid_pinpoints)
    assert (tiles.rows, tiles.columns, tiles.has_thumbnail) == (height // 384, width // 384, True)
    features = torch.randn(tiles.num_images, 27 * 27, 2, generator=torch.Generator().manual_seed(0))
    (theirs,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=CONFIG),  # type: ignore[arg-type]
        [features],
        torch.tensor([size]),
        vision_aspect_ratio="anyres_max_9",
    )
    rows, columns = tiling.map_size(tiles, GRID, size)
    _, (thumbnail, whole) = map_items(
        torch.zeros(tiles.num_images, 3, 1, 1), tiles, tiling, image_pixels=size, grid=GRID
    )
    assert whole[:2] == (rows, columns)
    assert ((whole.rows, whole.columns) != (whole.kept_rows, whole.kept_columns)) == (size in SCALED)
    ours = torch.cat([_map(features[:1], thumbnail), _map(features[1:], whole)])
    assert torch.equal(ours, theirs)
    (counted,) = PROCESSOR._get_num_multimodal_tokens([size]).num_image_tokens
    assert tiling.num_tokens(tiles, 27 * 27, image=size, tile=TILE, grid=GRID) == counted


@pytest.mark.parametrize("each", [1, 5, 49, 196])
@pytest.mark.parametrize("size", [(384, 384), (90, 2000), (1080, 1920)])
def test_a_pooled_map_has_as_many_tokens_per_feature_as_the_thumbnail(size: Size, each: int) -> None:
    tiling = scaled_tiling(CONFIG)
    tiles = tiling.choose(size, TILE)
    rows, columns = tiling.map_size(tiles, GRID, size)
    tokens = tiling.map_tokens(tiles, each, image=size, grid=GRID)
    assert 0 <= rows * columns * each - tokens * 27 * 27 < 27 * 27
    newlines = tiling.num_tokens(tiles, each, image=size, tile=TILE, grid=GRID) - each - tokens
    assert 1 <= newlines <= min(rows, tokens)


@pytest.mark.parametrize("size", [(24, 24), (20, 100), (100, 100)])
def test_soft_tokens_are_means_of_the_hosts_own_map_with_a_newline_behind_each_row(
    adopted: Any, size: tuple[int, int]
) -> None:
    model, processor, host = adopted("llava_onevision")
    raw = tiny_hosts.image(*size)
    outputs = processor.host.processor(text=["<image>"], images=[raw], return_tensors="pt")
    with torch.no_grad():
        (packed,) = host.model.get_image_features(outputs["pixel_values"], outputs["image_sizes"]).pooler_output
    (sizes,) = processor.transform("image", raw).maps[1:]
    whole = packed[36:].view(sizes.rows, sizes.columns + 1, -1)  # behind each row its newline
    for each in (36, 9, 5, 1):
        inputs = tiny_hosts.inputs(processor, [raw], f"image={each}")
        tokens = int(inputs["num_image_tokens"][1])
        cover = item_grid_cover(
            torch.tensor([tokens]),
            torch.tensor([sizes[:2]]),
            num_features=sizes.rows * sizes.columns,
            max_tokens=tokens,
        )
        pooled = average(whole[:, :-1].flatten(0, 1)[None], *cover)[0]
        with torch.no_grad():
            embeds = model.model.embed(inputs["input_ids"], {key: inputs.get(key) for key in inputs})
        soft = embeds[inputs["input_ids"] == processor.host.placeholder_id][each:]
        is_newline = (soft == host.model.image_newline).all(dim=-1)
        assert bool(is_newline[-1])
        torch.testing.assert_close(soft[~is_newline], pooled)
        counted = processor.image_extent(size)
        assert processor.space.media["image"].count(Budget.parse(f"image={each}").amounts["image"], counted).tokens == (
            each + len(soft)
        )


def test_released_sizes_are_counted_as_their_processors_do() -> None:
    """The table of docs/adopt.md."""
    next_sizes = tuple((rows * 336, columns * 336) for rows, columns in LLAVA_NEXT)
    of_next = TilesResizing(Tiling(pinpoints=next_sizes), (336, 336), (24, 24))
    of_onevision = TilesResizing(scaled_tiling(CONFIG), TILE, GRID)
    full_hd = (1080, 1920)
    assert [(one.num_images, one.tokens) for one in of_next.resolutions(full_hd)] == [(5, 1948), (3, 1608)]
    tokens = [one.tokens for one in of_onevision.resolutions(full_hd)]
    reached = [one.tokens for most in tokens if (one := of_onevision.at_most(full_hd, most)).tokens == most]
    assert sorted(reached, reverse=True) == [7269, 5967, 4501, 2379, 2052, 1149]


@contextmanager
def seeing(processor: Any, host: Any, max_tiles: int) -> Iterator[None]:
    """A host whose images have at most so many tiles, by its own config and its processor's."""
    image_processor, kept = processor.host.processor.image_processor, host.config.image_grid_pinpoints
    fewer = [size for size in kept if (size[0] // 24) * (size[1] // 24) <= max_tiles]
    host.config.image_grid_pinpoints = image_processor.image_grid_pinpoints = fewer
    yield
    host.config.image_grid_pinpoints = image_processor.image_grid_pinpoints = kept


@pytest.mark.parametrize("family", FAMILIES)
def test_images_cost_at_every_resolution_what_the_hosts_own_processor_writes(adopted: Any, family: str) -> None:
    _, processor, host = adopted(family)
    seen = set()
    for size in [(24, 24), (100, 100), (30, 40), (20, 100), (100, 20), (71, 73)]:
        resolutions = processor.host.resizing.resolutions(size)
        assert [one.num_images for one in resolutions] == sorted({one.num_images for one in resolutions}, reverse=True)
        for one in resolutions:
            raw = tiny_hosts.image(*size)
            with seeing(processor, host, one.setting or 9):
                written = processor.host.processor(text=["<image>"], images=[raw], return_tensors="pt")
            assert int((written["input_ids"] == processor.host.placeholder_id).sum()) == one.tokens
            assert processor.host(raw, one).num_images == one.num_images  # which raises where any number differs
            assert processor.host.resizing.at_most(size, one.tokens).tokens <= one.tokens
            seen.add(one.num_images)
        least = min(one.tokens for one in resolutions)
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels takes at least {least} tokens before it"):
            processor.host.resizing.at_most(size, least - 1)
    assert len(seen) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_of_fewer_tiles_is_the_hosts_own_with_those(adopted: Any, family: str) -> None:
    model, processor, host = adopted(family)
    raw = tiny_hosts.image(100, 100)
    budget = f"image<={processor.host.resizing.default((100, 100)).tokens - 1}"
    fewer = processor.host.resizing.at_most((100, 100), int(budget.removeprefix("image<=")))
    loaded = processor.transform("image", raw, budgets=[Budget.parse(budget), Budget()])  # at both, in one batch
    message = (Message("user", (Media("image", "x"), Text(adoption.QUESTION))),)
    batch = processor.batch([Sample("row", message, task="test")], [[loaded]], for_training=False)
    ours = processor.expand(batch, [[Budget.parse(budget)]], left_padding=True).inputs
    reduced = processor.expand(batch, [[Budget.parse(f"image=4,{budget}")]], left_padding=True).inputs
    whole = processor.expand(batch, [[Budget()]], left_padding=True).inputs
    assert (ours["scale_ids"].tolist(), reduced["scale_ids"].tolist()) == ([-1], [0])
    with seeing(processor, host, fewer.setting), torch.no_grad():
        theirs = adoption.host_inputs(processor, raw, host)
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        torch.testing.assert_close(model(**ours).logits, host(**theirs).logits)
        alone = tiny_hosts.inputs(processor, [raw], budget)
        assert torch.equal(model(**alone).logits, host(**theirs).logits)  # the very same passes of its encoder
        with tiny_hosts.without_adapter(model):
            expected = host(**adoption.oracle_inputs(model, host, reduced, theirs)).logits
            torch.testing.assert_close(model(**reduced).logits, expected)
    with torch.no_grad():
        expected = host(**adoption.host_inputs(processor, raw, host)).logits
        torch.testing.assert_close(model(**whole).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_of_tiles_are_refused_and_caps_keep_to_what_the_host_sees(adopted: Any, family: str) -> None:
    _, processor, _ = adopted(family)
    extent = processor.image_extent((100, 100))
    with pytest.raises(ValueError, match=r"^tiles<=2: the host of this model cuts images as it does; image<=N lets it"):
        count_tokens([extent], Budget.parse("tiles<=2"), processor.space)
    (count,) = count_tokens([extent], Budget.parse("total<=60"), processor.space)
    assert count.tiles == processor.host.tiling.choose((100, 100), (24, 24))
    findings = adoption._tile_resolutions(processor.host.tiling, (6, 6), (24, 24))
    assert findings
    for most in findings:
        for size in [(24, 24), (100, 100), (20, 100), (100, 20)]:
            assert processor.host.resizing.at_most(size, most).tokens <= most


def test_several_images_of_a_prompt_are_refused(adopted: Any) -> None:
    _, processor, _ = adopted("llava_onevision")
    parts = (Media("image", "x"), Media("image", "y"), Text("what?"))
    with pytest.raises(
        RefusedConversation, match=r"^a llava_onevision sees each of several images as one small square"
    ):
        processor.chat((Message("user", parts),))


def test_another_way_of_putting_tiles_together_is_refused() -> None:
    config = hf.LlavaOnevisionConfig(vision_aspect_ratio="anyres")
    with pytest.raises(ValueError, match=r"vision_aspect_ratio 'anyres'; allowed: anyres_max_N$"):
        scaled_tiling(config)
