"""What a soft token is said to cover is what its compressor makes it of, laid out as the encoder sees the image."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from mllm.budget import Extent, TokenCount
from mllm.budget.tiling import Tiles, Tiling
from mllm.compressors import Hybrid, Pool, Projector, ProjectorBank, Query, Stack
from mllm.page.overlay import NO_TOKEN, Overlay, cell_coverage, coverage, haar_coverage, laid_out, reads_features

SIZE = 8


def projectors(*budgets: int, in_size: int = SIZE) -> ProjectorBank:
    made = [Projector(in_size=in_size, out_size=6, hidden_size=None) for _ in budgets or (0,)]
    return ProjectorBank(made, budgets=budgets)


def features(num: int) -> Tensor:
    return torch.randn(1, num, SIZE, generator=torch.Generator().manual_seed(0))


def soft_tokens(compressor: nn.Module, values: Tensor, num_tokens: int) -> Tensor:
    """What a compressor gives of one image (1, T, D): (m, H)."""
    count, none = torch.tensor([num_tokens]), torch.tensor([0])
    lengths = torch.tensor([values.shape[1]])
    with torch.no_grad():
        return compressor(values, lengths, tokens=count, rates=none, max_tokens=num_tokens)[0]


def test_four_cells_of_a_grid_are_its_quarters() -> None:
    rows = cell_coverage(4, (4, 4))
    expected = torch.zeros(4, 4, 4)
    for token, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        expected[token, top : top + 2, left : left + 2] = 1 / 4
    assert torch.equal(rows, expected)


def test_one_token_covers_all_patches_alike_and_as_many_tokens_as_patches_one_each() -> None:
    assert torch.equal(cell_coverage(1, (3, 5)), torch.full((1, 3, 5), 1 / 15))
    assert torch.equal(cell_coverage(12, (3, 4)).flatten(1), torch.eye(12))


@pytest.mark.parametrize("num_tokens", [2, 3, 5, 7, 11])
def test_cells_that_cut_through_patches_share_them_out_exactly(num_tokens: int) -> None:
    weights = cell_coverage(num_tokens, (4, 6))
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(num_tokens))
    torch.testing.assert_close(weights.sum(dim=0), torch.full((4, 6), float(Fraction(num_tokens, 24))))


def test_haar_tokens_are_a_coarse_grid_and_then_the_patches_they_tell_apart() -> None:
    whole, halves = torch.full((2, 2), 1 / 4), torch.tensor([[1 / 2, 0], [1 / 2, 0]])
    expected = torch.stack([whole, whole, halves, halves.flip(1)])
    assert torch.equal(haar_coverage(4, (2, 2)), expected)


@pytest.mark.parametrize("num_tokens", [1, 4, 6, 16])
def test_a_pool_gives_the_projected_means_over_what_its_tokens_cover(num_tokens: int) -> None:
    pool, values = Pool(projectors=projectors(), grid=(4, 4)), features(16)
    weights = coverage(pool, num_tokens, (4, 4)).flatten(1)
    torch.testing.assert_close(soft_tokens(pool, values, num_tokens), pool.projectors[0](weights @ values[0]))


def test_a_stacked_token_depends_on_the_patches_it_covers_and_on_no_other() -> None:
    stack = Stack(projectors=projectors(4, in_size=4 * SIZE), grid_rows=(2,), grid=(4, 4))
    weights = coverage(stack, 4, (4, 4))
    assert torch.equal(weights, cell_coverage(4, (4, 4)))
    plain, values = soft_tokens(stack, features(16), 4), features(16)
    for patch in range(16):
        changed = values.clone()
        changed[0, patch] += 1
        has_moved = (soft_tokens(stack, changed, 4) != plain).any(dim=1)
        assert torch.equal(has_moved, weights.flatten(1)[:, patch] > 0)


def query(keys: str = "position", num_heads: int = 1) -> Query:
    torch.manual_seed(0)
    made = Query(
        in_size=SIZE,
        out_size=6,
        query_grid=(2, 2),
        feature_grid=(2, 2),
        keys=keys,  # type: ignore[arg-type]
        num_heads=num_heads,
    )
    return made.eval()


def test_queries_that_are_set_to_look_at_one_patch_cover_that_patch() -> None:
    looks_at = [2, 0, 3, 1]
    own = query()
    with torch.no_grad():
        # Positions are one-hot, a query is the position of the patch it is to find, and products of equals are large.
        positions = 10 * torch.eye(SIZE)[:4]
        own.pos_embed.copy_(positions)
        own.query.copy_(positions[looks_at] - positions)
        own.attn.in_proj_bias.zero_()
        own.attn.in_proj_weight[:SIZE] = 10 * torch.eye(SIZE)
        own.attn.in_proj_weight[SIZE : 2 * SIZE] = 10 * torch.eye(SIZE)
    expected = torch.eye(4)[looks_at].unflatten(1, (2, 2))
    torch.testing.assert_close(coverage(own, 4, (2, 2)), expected)
    assert torch.equal(coverage(own, 3, (2, 2)), coverage(own, 4, (2, 2))[:3])  # a smaller budget's are the first ones


@pytest.mark.parametrize("keys", ["position", "content"])
def test_queries_give_what_they_read_of_the_patches_they_look_at(keys: str) -> None:
    own, values = query(keys), features(4)
    assert reads_features(own) == (keys == "content")
    weights = coverage(own, 3, (2, 2), features=values[0]).flatten(1)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    with torch.no_grad():
        read = weights @ own.values(values)[0] @ own.proj
    torch.testing.assert_close(soft_tokens(own, values, 3), read, atol=1e-5, rtol=1e-5)


def test_images_of_their_own_shape_are_read_at_their_own_positions() -> None:
    own = query()
    wide = coverage(own, 2, (1, 6), has_own_grid=True)
    assert wide.shape == (2, 1, 6)
    torch.testing.assert_close(wide.sum(dim=(1, 2)), torch.ones(2))
    torch.testing.assert_close(coverage(own, 4, (2, 2), has_own_grid=True), coverage(own, 4, (2, 2)))


def test_a_hybrid_covers_cells_with_its_anchors_and_what_they_look_at_with_its_queries() -> None:
    torch.manual_seed(0)
    projector = Projector(in_size=SIZE, out_size=6, hidden_size=None)
    own = Hybrid(in_size=SIZE, projector=projector, grid=(4, 4), anchors=(1, 4), max_tokens=8, num_heads=2).eval()
    seen: list[Tensor] = []
    own.feature_attn.register_forward_pre_hook(
        lambda module, inputs: seen.append(module.weights(*inputs[:2]).mean(dim=1)[0])
    )
    values = features(16)
    soft_tokens(own, values, 6)
    weights = coverage(own, 6, (4, 4), features=values[0])
    assert torch.equal(weights[:4], cell_coverage(4, (4, 4)))
    torch.testing.assert_close(weights[4:].flatten(1), seen[0])


def test_tiles_lie_where_they_were_cut_beside_their_thumbnail() -> None:
    # Two tiles side by side behind a thumbnail, two tokens per tile, one above the other: the prompt is the
    # thumbnail's two tokens and then the rows of both tiles, each row ended by a newline.
    tiles = Tiles(1, 2, has_thumbnail=True)
    extent = Extent("image", grid=(2, 1), image_pixels=(20, 20), tile_pixels=(20, 10))
    count = TokenCount(8, each=2, tiles=tiles)
    weights = cell_coverage(2, (2, 1)).expand(3, -1, -1, -1)
    overlay = Overlay.of(weights, extent, count, Tiling())
    assert overlay.owners().tolist() == [[0, 2, 3], [1, 5, 6]]
    assert overlay.of_token(3).tolist() == [[0, 0, 1], [0, 0, 0]]  # type: ignore[union-attr]
    assert overlay.of_token(4) is None  # a newline
    with pytest.raises(ValueError, match="there is no soft token 9; allowed: 1 to 8"):
        overlay.of_token(8)


def test_patches_of_tokens_that_lie_over_padding_belong_to_none() -> None:
    # A wide image in a square of 2 x 2 tiles: the outer rows of tokens are padding and not in the prompt.
    tiles = Tiles(2, 2, has_thumbnail=False)
    extent = Extent("image", grid=(2, 2), image_pixels=(10, 20), tile_pixels=(10, 10))
    count = TokenCount(8, each=4, tiles=tiles)
    overlay = Overlay.of(
        cell_coverage(4, (2, 2)).expand(4, -1, -1, -1), extent, count, Tiling(thumbnail=False, newline=False)
    )
    assert overlay.num_tokens == 8
    owners = overlay.owners()
    assert owners[0].tolist() == owners[3].tolist() == [NO_TOKEN] * 4
    assert owners[1:3].flatten().tolist() == list(range(8))


def test_images_of_a_layout_lie_at_their_spots() -> None:
    first, second = torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)
    assert laid_out([first, second], ((0, 0), (1, 1))).tolist() == [
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]]
    ]


def test_a_compressor_of_another_package_says_that_it_does_not_tell() -> None:
    with pytest.raises(ValueError, match="Linear does not tell which patches"):
        coverage(nn.Linear(1, 1), 1, (1, 1))  # type: ignore[arg-type]
