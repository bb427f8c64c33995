"""What pooling promises: plain means, at any rate or count, whatever else is in the batch."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.compressors import Pool, Projector, ProjectorBank
from mllm.compressors.area_pooling import grid_cover, grid_rows, stream_cover

SIZE = 5


def identity() -> ProjectorBank:
    """A bank whose one projector changes nothing, so that pooling itself is seen."""
    projector = Projector(in_size=SIZE, out_size=SIZE, hidden_size=None)
    nn.init.eye_(projector[0].weight)
    nn.init.zeros_(projector[0].bias)
    return ProjectorBank([projector])


def clips(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random clips padded with NaN, so that any use of the padding shows."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.full((len(lengths), max(lengths), SIZE), float("nan"))
    for clip, length in zip(batch, lengths, strict=True):
        clip[:length] = torch.randn(length, SIZE, generator=generator)
    return batch, torch.tensor(lengths)


def pool(features: Tensor, lengths: Tensor, costs: list[tuple[int, int]], max_tokens: int = 0, **kwargs) -> Tensor:
    """Pool at (tokens, rate) per item."""
    tokens, rates = (torch.tensor(column) for column in zip(*costs, strict=True))
    compressor = Pool(projectors=kwargs.pop("projectors", None) or identity(), **kwargs)
    return compressor(
        features, lengths, tokens=tokens, rates=rates, max_tokens=max_tokens or max(tokens.tolist())
    ).detach()


def pool_grid(images: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    number = len(images)
    return pool(images, torch.full((number,), grid[0] * grid[1]), [(count, 0)] * number, grid=grid)


@pytest.mark.parametrize("rate", range(1, 12))
def test_every_rate_is_a_plain_loop_over_full_windows(rate: int) -> None:
    features, lengths = clips(11)
    expected = [features[0, start : start + rate].mean(dim=0) for start in range(0, 11 - rate + 1, rate)]
    assert len(expected) == 11 // rate
    torch.testing.assert_close(pool(features, lengths, [(11 // rate, rate)])[0], torch.stack(expected))


def test_rate_one_and_a_count_of_all_frames_are_the_identity() -> None:
    features, lengths = clips(13)
    assert torch.equal(pool(features, lengths, [(13, 1)]), features)
    assert torch.equal(pool(features, lengths, [(13, 0)]), features)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10])
def test_counts_between_are_the_integral_over_equal_stretches(count: int) -> None:
    """Frames as a step function, integrated numerically on a fine raster."""
    features, lengths = clips(10)
    fine = features[0].repeat_interleave(count, dim=0)  # every border of a stretch falls on this raster
    expected = fine.unflatten(0, (count, -1)).mean(dim=1)
    torch.testing.assert_close(pool(features, lengths, [(count, 0)])[0], expected)


@pytest.mark.parametrize(("grid", "count"), [((24, 24), n) for n in (576, 144, 36, 9, 1)] + [((4, 6), 6), ((6, 4), 24)])
def test_grids_that_divide_are_avg_pool2d(grid: tuple[int, int], count: int) -> None:
    images = torch.randn(2, grid[0] * grid[1], SIZE, generator=torch.Generator().manual_seed(0))
    stride = round((grid[0] * grid[1] / count) ** 0.5)
    grids = images.transpose(1, 2).unflatten(2, grid)
    expected = functional.avg_pool2d(grids, stride).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_grid(images, count, grid), expected)
    if count == grid[0] * grid[1]:
        assert torch.equal(pool_grid(images, count, grid), images)


def rectangles(count: int, grid: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The documented cells, by plain arithmetic: (top, bottom, left, right) in patches, in reading order."""
    rows = int(grid_rows(torch.tensor([count]), grid))
    per_row = [(row + 1) * count // rows - row * count // rows for row in range(rows)]
    cells, top = [], 0.0
    for columns in per_row:
        bottom = top + grid[0] * columns / count
        borders = [grid[1] * column / columns for column in range(columns + 1)]
        cells += [(top, bottom, left, right) for left, right in pairwise(borders)]
        top = bottom
    return cells


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (7, 1)])
def test_every_count_is_the_integral_over_its_rectangles(grid: tuple[int, int]) -> None:
    image = torch.randn(1, grid[0] * grid[1], SIZE, generator=torch.Generator().manual_seed(0))
    patches = image[0].unflatten(0, grid)
    for count in range(1, grid[0] * grid[1] + 1):
        soft = pool_grid(image, count, grid)[0]
        for token, (top, bottom, left, right) in zip(soft, rectangles(count, grid), strict=True):
            integral = torch.zeros(SIZE)
            for row, column in product(range(grid[0]), range(grid[1])):
                high = max(0.0, min(bottom, row + 1) - max(top, row))
                wide = max(0.0, min(right, column + 1) - max(left, column))
                integral += high * wide * patches[row, column]
            torch.testing.assert_close(token, integral / ((bottom - top) * (right - left)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(12, 12), (9, 9), (6, 10), (12, 2)])
def test_cells_of_any_count_tile_the_grid_with_equal_areas(grid: tuple[int, int]) -> None:
    """Each patch is shared out completely, each cell gets as much as any other, and rows differ by one cell at most."""
    most = grid[0] * grid[1]
    for counts in torch.arange(1, most + 1).split(32):
        cover, area = grid_cover(counts, grid, max_tokens=int(counts.max()))
        for count, cell_cover, patches in zip(counts.tolist(), cover, area, strict=True):
            torch.testing.assert_close(cell_cover[:count].sum(dim=0), torch.ones(most))
            torch.testing.assert_close(cell_cover[:count].sum(dim=1), patches.expand(count))
    rows = grid_rows(torch.arange(1, most + 1), grid)
    assert rows.min() == 1
    assert rows.max() == grid[0]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 1), (9, 3), (18, 3), (24, 4), (32, 4), (64, 8), (256, 16)])
def test_whole_patches_win_over_squares(count: int, rows: int) -> None:
    """18 cells of 8x4 patches rather than rows of 4 and 5; of 8x4 and 4x8 patches the fewer rows."""
    assert grid_rows(torch.tensor([count]), (24, 24)).item() == rows


def test_an_item_in_a_mixed_batch_equals_the_item_alone() -> None:
    """Rates and counts, long and short clips, NaN in the padding, room for more tokens than anyone has."""
    features, lengths = clips(13, 9, 4, 10)
    costs = [(3, 4), (5, 0), (4, 1), (10, 0)]
    together = pool(features, lengths, costs, max_tokens=20)
    assert together.shape == (4, 20, SIZE)
    for row, (length, cost) in enumerate(zip(lengths.tolist(), costs, strict=True)):
        alone = pool(features[row : row + 1, :length], lengths[row : row + 1], [cost])
        torch.testing.assert_close(together[row, : cost[0]], alone[0])
        assert not together[row, cost[0] :].any()


def test_images_of_one_batch_may_differ_in_count() -> None:
    images = torch.randn(3, 36, SIZE, generator=torch.Generator().manual_seed(0))
    counts = [36, 7, 1]
    together = pool(images, torch.full((3,), 36), [(count, 0) for count in counts], max_tokens=50, grid=(6, 6))
    for row, count in enumerate(counts):
        torch.testing.assert_close(together[row, :count], pool_grid(images[row : row + 1], count, (6, 6))[0])
        assert not together[row, count:].any()


def test_project_first_pools_what_the_projector_gives() -> None:
    torch.manual_seed(0)
    bank = ProjectorBank([Projector(in_size=SIZE, out_size=3, hidden_size=8)])
    images = torch.randn(1, 16, SIZE)
    soft = pool(images, torch.tensor([16]), [(4, 0)], grid=(4, 4), projectors=bank, project_first=True)
    projected = bank[0](images).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(soft, functional.avg_pool2d(projected, 2).flatten(2).transpose(1, 2).detach())
    behind = pool(images, torch.tensor([16]), [(4, 0)], grid=(4, 4), projectors=bank)
    assert not torch.allclose(soft, behind, atol=1e-3)


def test_project_first_of_padded_clips_is_finite_in_both_directions() -> None:
    bank = ProjectorBank([Projector(in_size=SIZE, out_size=3, hidden_size=8)])
    features, lengths = clips(7, 3)
    features.requires_grad_()
    costs = {"tokens": torch.tensor([3, 3]), "rates": torch.tensor([2, 0])}
    soft = Pool(projectors=bank, project_first=True)(features, lengths, **costs, max_tokens=4)
    soft.square().sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in bank.parameters())


def test_coarse_tokens_are_means_of_fine_ones() -> None:
    features, lengths = clips(16)
    fine = pool(features, lengths, [(8, 2)])
    torch.testing.assert_close(pool(fine, torch.tensor([8]), [(2, 4)]), pool(features, lengths, [(2, 8)]))


def test_half_precision_keeps_means_exact_where_they_are() -> None:
    """Three equal values average to themselves, which a weight of 1/3 in bfloat16 would miss."""
    features = torch.full((1, 9, SIZE), 3.0, dtype=torch.bfloat16)
    bank = identity().to(torch.bfloat16)
    soft = pool(features, torch.tensor([9]), [(3, 3)], projectors=bank)
    assert torch.equal(soft, torch.full_like(soft, 3.0))


def test_long_streams_overflow_nothing() -> None:
    lengths = torch.tensor([60_000])
    cover, area = stream_cover(lengths, torch.tensor([2]), torch.tensor([0]), num_features=60_000, max_tokens=2)
    assert cover[0].sum(dim=1).tolist() == [30_000, 30_000]
    assert area.tolist() == [30_000]
