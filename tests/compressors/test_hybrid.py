"""What the hybrid promises: anchors are the pooled map, queries nest behind them, and batch mates change nothing."""

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from mllm.budget import Budget, MediumSpace, hybrid_sizes
from mllm.compressors import Hybrid, build_compressor
from mllm.compressors.hybrid import queries_in_use

SETTINGS = {"compressor": "hybrid", "budgets": [1, 4, 10, 24], "anchors": [4, 9], "query_heads": 2}


def build(grid: tuple[int, int] = (6, 6), **changes) -> Hybrid:
    torch.manual_seed(1)
    made = build_compressor("image", {**SETTINGS, **changes}, in_size=16, out_size=10, grid=grid).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made  # pyright: ignore[reportReturnType]


def read(made: Hybrid, pictures: Tensor, *counts: int, more: int = 0) -> Tensor:
    tokens = torch.tensor(counts)
    lengths = torch.full_like(tokens, pictures.shape[1])
    return made(pictures, lengths, tokens=tokens, rates=torch.zeros_like(tokens), max_tokens=max(counts) + more)


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (9, 3), (5, 7)])
@torch.no_grad()
def test_a_batch_of_any_counts_is_each_item_alone(grid: tuple[int, int]) -> None:
    made = build(grid)
    counts = list(range(1, 25))
    pictures = torch.randn(len(counts), grid[0] * grid[1], 16)
    together = read(made, pictures, *counts, more=7)
    assert together.shape == (24, 31, 10)
    for number, count in enumerate(counts):
        alone = read(made, pictures[number : number + 1], count)[0]
        torch.testing.assert_close(together[number, :count], alone, rtol=1e-4, atol=1e-5)
        assert not together[number, count:].any()
        assert alone.abs().sum(dim=1).all()


@torch.no_grad()
def test_counts_are_prefixes_within_one_map_and_not_between_two() -> None:
    made, picture = build(), torch.randn(1, 36, 16)
    soft = {count: read(made, picture, count)[0] for count in range(1, 25)}
    for low, high in ((1, 3), (4, 8), (9, 24)):
        for count in range(low, high + 1):
            torch.testing.assert_close(soft[count], soft[high][:count], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(soft[3], soft[4][:3], atol=1e-2)
    assert not torch.allclose(soft[8][4:], soft[9][4:8], atol=1e-2)


@torch.no_grad()
def test_anchors_are_the_pooled_map_behind_the_projector() -> None:
    made, picture = build(), torch.randn(2, 36, 16)
    grid = picture.unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    for count, side in ((4, 2), (7, 2), (9, 3), (20, 3)):
        means = functional.avg_pool2d(grid, 6 // side).flatten(2).transpose(1, 2)
        found = read(made, picture, count, count)[:, : side * side]
        torch.testing.assert_close(found, made.projector(means), rtol=1e-4, atol=1e-5)


def test_queries_depend_on_anchors_features_and_where_they_are() -> None:
    made, picture = build(), torch.randn(1, 36, 16)
    before = read(made, picture, 12)[0, 9:]
    before.square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert len(made.query) == 15
    assert not torch.allclose(read(made, picture.flip(1), 12)[0, 9:], before, atol=1e-3)
    with torch.no_grad():
        made.anchor_attn.out_proj.weight.zero_()
    assert not torch.allclose(read(made, picture, 12)[0, 9:], before, atol=1e-3)


def test_sizes_by_default_and_what_they_need() -> None:
    assert hybrid_sizes({"budgets": [256, 64, 16, 1]}) == ((1, 16, 64), 192)
    assert hybrid_sizes({"budgets": [63]}) == ((1, 16), 47)
    assert hybrid_sizes({"budgets": [4]}) == ((1,), 3)
    assert hybrid_sizes({"budgets": {"start": 2, "stop": 20, "step": 2}, "num_queries": 30}) == ((1, 16), 30)
    assert [queries_in_use(count, (1, 4, 9)) for count in (1, 3, 4, 8, 9, 12, 15)] == [0, 2, 2, 4, 4, 4, 6]
    assert MediumSpace.from_settings("image", SETTINGS).max_tokens == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": [4, 25]}, r"media.image.anchors is \[4, 25\]; allowed are counts 1..24"),
        ({"num_queries": 3}, r"num_queries is 3; anchors \[1, 4, 9\] and 24 tokens need 15"),
        ({"per_budget_projector": True}, "per_budget_projector does not go with compressor 'hybrid'"),
        ({"keys": "content"}, "media.image.keys does not apply to compressor 'hybrid'; allowed: anchors, query_heads"),
        ({"budgets": ["/4"]}, "compressor 'hybrid' is for pictures at counts"),
        ({"query_heads": 3}, "must be a multiple of 4 and of query_heads=3"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_streams_and_small_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"media\.audio\.compressor 'hybrid' is for pictures at counts"):
        build_compressor("audio", {**SETTINGS, "budgets": ["/4"]}, in_size=16, out_size=10)
    with pytest.raises(ValueError, match="9 cannot be pooled of a grid of 2x4"):
        build((2, 4))


def test_a_whole_model_answers_at_any_count() -> None:
    own = tiny.settings(("image",), image={"compressor": "hybrid", "budgets": [1, 4, 16, 64]})
    model, processor = tiny.model(own), tiny.processor(own)
    batch = tiny.batch(processor, [([tiny.random_media("image"), "what is it?"], "red")])
    for count in (1, 15, 16, 40, 64):
        inputs = processor.expand(batch, [[Budget.parse(f"image={count}")]], left_padding=True).inputs
        assert int(inputs["num_image_tokens"]) == count
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"allowed are counts 1\.\.111"):  # 64 anchors and 47 queries
        processor.expand(batch, [[Budget.parse("image=112")]], left_padding=True)
