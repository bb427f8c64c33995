"""Items of a batch with a grid each: every one is compressed as alone on its grid, and padding is never looked at."""

import copy
from itertools import product

import pytest
import torch
from blocks import medium, merged
from torch import Tensor
from torch.nn import functional

from mllm.compressors import Compressor, Query, build_compressor
from mllm.compressors.area_pooling import grid_cover, item_grid_cover
from mllm.compressors.query import item_positions, sincos_positions

SIZE, OUT = 16, 6
GRIDS = [(2, 7), (4, 4), (1, 3), (5, 3), (3, 5)]
POOL = {"compressor": "pool", "budgets": [9, 4, 1]}
SETTINGS = {
    "pool": POOL,
    "pool behind the projector": merged(POOL, {"projector": {"before_pooling": True}}),
    "position keys": {"compressor": {"kind": "query", "num_queries": 9}, "budgets": [9, 4, 1]},
    "content keys": {"compressor": {"kind": "query", "num_queries": 9, "keys": "content"}, "budgets": [9, 4, 1]},
    "two heads": {"compressor": {"kind": "query", "num_queries": 4, "num_heads": 2}, "budgets": [4]},
}


def build(name: str) -> Compressor:
    torch.manual_seed(0)
    sizes = {"in_size": SIZE, "out_size": OUT}
    return build_compressor("image", medium("image", SETTINGS[name]), **sizes, grid=(4, 4), max_patches=16).eval()


def on_one_grid(compressor: Compressor, grid: tuple[int, int]) -> Compressor:
    """The same weights on one grid for all images."""
    fixed = copy.deepcopy(compressor)
    setattr(fixed, "feature_grid" if isinstance(fixed, Query) else "grid", grid)
    return fixed


def images() -> tuple[Tensor, Tensor, Tensor]:
    """Random features of every grid, padded with NaN, their lengths, and the grids."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.tensor(GRIDS)
    values = torch.full((len(GRIDS), 18, SIZE), float("nan"))
    for row, length in zip(values, grids.prod(1).tolist(), strict=True):
        row[:length] = torch.randn(length, SIZE, generator=generator)
    return values, grids.prod(1), grids


@pytest.mark.parametrize("grid", [*GRIDS, (16, 16), (9, 28), (1, 1), (24, 1)])
def test_the_cells_on_an_own_grid_are_those_on_that_grid_bit_for_bit(grid: tuple[int, int]) -> None:
    length = grid[0] * grid[1]
    tokens = torch.arange(1, length + 1)
    expected, area = grid_cover(tokens, grid, max_tokens=length)
    cover, item_area = item_grid_cover(
        tokens, torch.tensor([grid] * length), num_features=length + 5, max_tokens=length
    )
    is_cell = torch.arange(length) < tokens[:, None]
    assert torch.equal(cover[..., :length][is_cell], expected[is_cell])
    assert not cover[..., length:][is_cell].any()
    assert torch.equal(area, item_area)


@pytest.mark.parametrize(("table_grid", "grid"), product([(3, 3), (4, 6), (1, 5)], [(3, 3), (7, 2), (16, 16), (1, 1)]))
def test_positions_are_those_that_torch_resizes(table_grid: tuple[int, int], grid: tuple[int, int]) -> None:
    table = sincos_positions(table_grid, SIZE, torch.device("cpu"))
    image = table.unflatten(0, table_grid).permute(2, 0, 1)[None]
    expected = functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    resized = item_positions(table, table_grid, torch.tensor([grid]), num_features=grid[0] * grid[1] + 3)[0]
    torch.testing.assert_close(resized[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert resized.isfinite().all()


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_a_image_in_a_batch_is_the_image_alone_on_its_grid(name: str) -> None:
    compressor = build(name)
    values, lengths, grids = images()
    tokens = torch.tensor([9 if "queries" not in name else 4, 4, 3, 1, 2])
    rates = torch.zeros_like(tokens)
    soft = compressor(values, lengths, tokens=tokens, rates=rates, max_tokens=20, grids=grids)
    assert soft.shape == (len(GRIDS), 20, OUT)
    for row, (length, count) in enumerate(zip(lengths.tolist(), tokens.tolist(), strict=True)):
        fixed = on_one_grid(compressor, GRIDS[row])
        budget = {"tokens": tokens[row : row + 1], "rates": rates[:1], "max_tokens": count}
        alone = fixed(values[row : row + 1, :length], lengths[row : row + 1], **budget)
        torch.testing.assert_close(soft[row, :count], alone[0], rtol=1e-4, atol=1e-5)
        assert not soft[row, count:].any()


@torch.no_grad()
def test_fewer_tokens_stay_the_first_of_more_on_an_own_grid() -> None:
    compressor = build("content keys")
    values, lengths, grids = images()
    many, few = (
        compressor(values, lengths, tokens=tokens, rates=0 * tokens, max_tokens=9, grids=grids)
        for tokens in (torch.full((5,), 9), torch.full((5,), 4))
    )
    assert torch.equal(many[:, :4], few[:, :4])


@pytest.mark.parametrize("name", ["pool", "content keys"])
def test_padding_gets_no_gradient(name: str) -> None:
    values, lengths, grids = images()
    is_patch = torch.arange(18) < lengths[:, None]
    values = values.nan_to_num(3.0).requires_grad_()
    tokens = torch.full((5,), 3)
    build(name)(values, lengths, tokens=tokens, rates=0 * tokens, max_tokens=3, grids=grids).square().sum().backward()
    assert values.grad is not None
    assert not values.grad[~is_patch].any()
    assert (values.grad[is_patch].abs().sum(dim=1) > 0).all()


def test_what_needs_one_grid_is_refused_when_it_is_built() -> None:
    sizes = {"in_size": SIZE, "out_size": OUT, "grid": (4, 4), "max_patches": 16}
    with pytest.raises(ValueError, match=r"compressor.kind stack needs one grid.*allowed: pool, query"):
        build_compressor("image", medium("image", {"compressor": "stack", "budgets": [4, 1]}), **sizes)
    with pytest.raises(ValueError, match=r"compressor.order haar needs one grid.*allowed: raster"):
        build_compressor("image", medium("image", merged(POOL, {"compressor": {"order": "haar"}})), **sizes)
    with pytest.raises(ValueError, match="17 tokens cannot be met"):
        build_compressor("image", medium("image", {**POOL, "budgets": [17]}), **sizes)
