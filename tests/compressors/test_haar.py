"""What the Haar order promises: prefixes that are whole maps, exactly, at every count it serves and at no other."""

import pytest
import tiny
import torch
from blocks import one_space
from torch import nn
from torch.nn import functional

from mllm.budget import Amount, Budget, Extent
from mllm.budget.nesting import haar_grids
from mllm.compressors import Pool, Projector, ProjectorBank
from mllm.compressors.haar import haar, inverse_haar
from mllm.inference.answerer import Answerer, Decoding

GRID = (24, 24)
SIZE = 5


def identity() -> ProjectorBank:
    projector = Projector(in_size=SIZE, out_size=SIZE, hidden_size=None)
    nn.init.eye_(projector[0].weight)
    nn.init.zeros_(projector[0].bias)
    return ProjectorBank([projector])


def patches(grid: tuple[int, int], number: int = 2) -> torch.Tensor:
    return torch.randn(number, grid[0] * grid[1], SIZE, generator=torch.Generator().manual_seed(0))


def soft_tokens(compressor: Pool, features: torch.Tensor, counts: list[int], max_tokens: int) -> torch.Tensor:
    tokens = torch.tensor(counts)
    lengths = torch.full_like(tokens, features.shape[1])
    return compressor(features, lengths, tokens=tokens, rates=torch.zeros_like(tokens), max_tokens=max_tokens).detach()


@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        ((24, 24), [9, 18, 36, 72, 144, 288, 576]),
        ((8, 4), [2, 4, 8, 16, 32]),
        ((6, 10), [15, 30, 60]),
        ((27, 27), [729]),
    ],
)
def test_the_levels_of_a_grid_double_from_the_coarsest(grid: tuple[int, int], counts: list[int]) -> None:
    assert [rows * columns for rows, columns in haar_grids(grid)] == counts


@pytest.mark.parametrize("grid", [(24, 24), (8, 4), (6, 10)])
def test_each_prefix_rebuilds_the_pooled_map(grid: tuple[int, int]) -> None:
    """At the count of every map the span is exactly the average pooling to that map, and the whole is the grid."""
    features = patches(grid)
    compressor = Pool(projectors=identity(), grid=grid, order="haar")
    grids = features.transpose(1, 2).unflatten(2, grid)
    for rows, columns in haar_grids(grid):
        prefix = soft_tokens(compressor, features, [rows * columns] * 2, rows * columns)
        pooled = functional.avg_pool2d(grids, (grid[0] // rows, grid[1] // columns)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(inverse_haar(prefix, grid), pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse_haar(haar(features, grid), grid), features, rtol=1e-5, atol=1e-5)


def test_the_grids_of_m3_come_out_as_its_pooling_gives_them() -> None:
    features = patches(GRID)
    raster = Pool(projectors=identity(), grid=GRID)
    for count in (9, 36, 144, 576):
        expected = soft_tokens(raster, features, [count] * 2, count)
        torch.testing.assert_close(inverse_haar(haar(features, GRID)[:, :count], GRID), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("project_first", [False, True])
def test_small_budgets_are_prefixes_also_in_a_mixed_batch(project_first: bool) -> None:
    torch.manual_seed(0)
    bank = ProjectorBank([Projector(in_size=SIZE, out_size=3, hidden_size=8)])
    compressor = Pool(projectors=bank, grid=GRID, order="haar", project_first=project_first)
    features = patches(GRID, 3)
    largest = soft_tokens(compressor, features, [576] * 3, 576)
    mixed = soft_tokens(compressor, features, [9, 144, 36], 200)
    for item, count in enumerate((9, 144, 36)):
        torch.testing.assert_close(mixed[item, :count], largest[item, :count])
        assert not mixed[item, count:].any()


def test_a_prefix_that_is_no_map_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="10 tokens in Haar order are no whole grid; allowed: 9, 18, 36"):
        inverse_haar(torch.zeros(1, 10, SIZE), GRID)
    space = one_space("image", {"compressor": {"kind": "pool", "order": "haar"}, "budgets": [576, 9]})
    extent = Extent("image", grid=GRID)
    assert [space.count(Amount.parse(text), extent).tokens for text in ("max", "9", "72")] == [576, 9, 72]
    for text in ("1", "10", "100"):
        with pytest.raises(
            ValueError, match=f"image={text} is no whole grid in Haar order: allowed are counts 9, 18, 36"
        ):
            space.count(Amount.parse(text), extent)
    with pytest.raises(ValueError, match=r"image=577 cannot be met: allowed are counts 1\.\.576"):
        space.count(Amount.parse("577"), extent)


def test_a_model_in_haar_order_answers_alone_as_in_a_batch() -> None:
    config = tiny.settings(("image",), image={"compressor": {"order": "haar"}})
    answerer = Answerer(tiny.model(config, seed=3), tiny.processor(config), Decoding(max_new_tokens=6))
    rows = [([tiny.random_media("image", seed=seed), "what colour?"], "red") for seed in (1, 2)]
    budgets = [Budget.parse("image=64"), Budget.parse("image=4")]
    together = answerer.answer_batch(tiny.batch(answerer.processor, rows), [budgets])[0]
    alone = [
        answerer.answer_batch(tiny.batch(answerer.processor, [row]), [[budget]])[0][0]
        for row, budget in zip(rows, budgets, strict=True)
    ]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    with pytest.raises(ValueError, match="image=5 is no whole grid in Haar order: allowed are counts 1, 2, 4, 8"):
        answerer.answer_batch(tiny.batch(answerer.processor, rows), [[Budget.parse("image=5")] * 2])
