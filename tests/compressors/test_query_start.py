"""Where queries begin: cells of a pyramid, and attention that is the mean over each."""

import copy

import pytest
import torch

from mllm.compressors import Query
from mllm.compressors.query_init import initialise_as_pyramid, pyramid_cells


def query_of(grid: tuple[int, int], queries: tuple[int, int], **changes) -> Query:
    sizes = {"in_size": 64, "out_size": 8, "query_grid": queries, "feature_grid": grid, "num_heads": 2}
    return Query(**{**sizes, **changes}).eval()


def area(cells: list[tuple[int, int, int, int]]) -> int:
    return sum((bottom - top) * (right - left) for top, bottom, left, right in cells)


def test_cells_are_the_whole_then_three_of_four_quarters_and_so_on() -> None:
    cells = pyramid_cells(16, (8, 8))
    assert cells[:4] == [(0, 8, 0, 8), (0, 4, 0, 4), (0, 4, 4, 8), (4, 8, 0, 4)]
    assert area(cells[1:4]) == 48
    assert area(cells[4:]) == 12 * 4
    assert {(b - t, e - s) for t, b, s, e in cells[4:]} == {(2, 2)}
    assert len(set(cells)) == 16


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (6, 10), (1, 5), (3, 3)])
def test_all_cells_lie_in_the_grid_and_none_repeats_while_there_are_others(grid: tuple[int, int]) -> None:
    num_features = grid[0] * grid[1]
    cells = pyramid_cells(2 * num_features + 3, grid)
    assert len(cells) == 2 * num_features + 3
    assert all(0 <= t < b <= grid[0] and 0 <= s < e <= grid[1] for t, b, s, e in cells)
    distinct = len(set(cells))
    assert len(set(cells[:distinct])) == distinct
    singles = {cell for cell in cells if area([cell]) == 1}
    assert len(singles) == num_features


@pytest.mark.parametrize(("grid", "queries"), [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((4, 6), (3, 4))])
def test_each_query_reads_the_mean_of_its_cell(grid: tuple[int, int], queries: tuple[int, int]) -> None:
    compressor = query_of(grid, queries)
    left = initialise_as_pyramid(compressor, torch.Generator().manual_seed(0))
    assert float(left.max()) < 0.3  # nats, of 2.8 and more at the released start
    grids = torch.randn(1, *grid, 64, generator=torch.Generator().manual_seed(1))
    normed = compressor.ln_v(grids)
    cells = pyramid_cells(compressor.num_queries, grid)
    with torch.no_grad():
        read = compressor._read(grids.flatten(1, 2))[0]
        means = torch.stack([normed[0, t:b, s:e].flatten(0, 1).mean(0) for t, b, s, e in cells])
    alike = torch.nn.functional.cosine_similarity(read[:, None], means[None], dim=-1)
    assert alike.argmax(1).tolist() == list(range(len(cells)))
    assert float(alike.diagonal().min()) > 0.85


def test_the_search_is_in_float32_and_only_its_result_is_rounded() -> None:
    """Exactly what float32 weights with the same (rounded) positions get, rounded; the divergence is that behind it."""
    rough = query_of((8, 8), (4, 4)).to(torch.bfloat16)
    precise = copy.deepcopy(rough).float()
    left = initialise_as_pyramid(rough, torch.Generator().manual_seed(0))
    left_precise = initialise_as_pyramid(precise, torch.Generator().manual_seed(0))
    for name, weight in precise.named_parameters():
        assert rough.get_parameter(name).equal(weight.bfloat16()), name
    assert left.dtype == torch.float32
    assert not left.equal(left_precise)
    torch.testing.assert_close(left, left_precise, rtol=0, atol=0.05)


def test_it_is_the_same_for_the_same_seed_frozen_or_not_and_leaves_positions_alone() -> None:
    """The search takes 300 steps, so that one pair of compressors answers all of it."""
    frozen, trained = query_of((4, 4), (2, 2)).requires_grad_(False), query_of((4, 4), (2, 2))
    for compressor in (frozen, trained):
        before = compressor.pos_embed.clone()
        initialise_as_pyramid(compressor, torch.Generator().manual_seed(3))
        assert compressor.pos_embed.equal(before)
        assert all(parameter.grad is None for parameter in compressor.parameters())
    assert frozen.query.equal(trained.query)
    assert frozen.attn.in_proj_weight.equal(trained.attn.in_proj_weight)
    assert not frozen.query.requires_grad


def test_streams_and_content_keys_are_refused() -> None:
    for compressor in (query_of((1, 8), (1, 4), windowed=True), query_of((4, 4), (2, 2), keys="content")):
        with pytest.raises(ValueError, match=r"compressor.start pyramid goes with images and keys: position"):
            initialise_as_pyramid(compressor, torch.Generator())
