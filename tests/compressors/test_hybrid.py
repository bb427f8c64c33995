"""What the hybrid promises: anchors are the pooled map, queries nest behind them, and batch mates change nothing."""

import pytest
import tiny
import torch
from blocks import medium, merged, one_space
from torch import Tensor
from torch.nn import functional

from mllm.budget import Budget
from mllm.budget.nesting import num_queries
from mllm.compressors import Hybrid, build_compressor

SETTINGS = {"compressor": {"kind": "hybrid", "anchors": [4, 9], "num_heads": 2}, "budgets": [1, 4, 10, 24]}


def build(grid: tuple[int, int] = (6, 6), **changes) -> Hybrid:
    torch.manual_seed(1)
    made = build_compressor(
        "image", medium("image", merged(SETTINGS, changes)), in_size=16, out_size=10, grid=grid
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made  # pyright: ignore[reportReturnType]


def read(made: Hybrid, images: Tensor, *counts: int, more: int = 0) -> Tensor:
    tokens = torch.tensor(counts)
    lengths = torch.full_like(tokens, images.shape[1])
    return made(images, lengths, tokens=tokens, rates=torch.zeros_like(tokens), max_tokens=max(counts) + more)


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (9, 3), (5, 7)])
@torch.no_grad()
def test_a_batch_of_any_counts_is_each_item_alone(grid: tuple[int, int]) -> None:
    made = build(grid)
    counts = list(range(1, 25))
    images = torch.randn(len(counts), grid[0] * grid[1], 16)
    together = read(made, images, *counts, more=7)
    assert together.shape == (24, 31, 10)
    for number, count in enumerate(counts):
        alone = read(made, images[number : number + 1], count)[0]
        torch.testing.assert_close(together[number, :count], alone, rtol=1e-4, atol=1e-5)
        assert not together[number, count:].any()
        assert alone.abs().sum(dim=1).all()


@torch.no_grad()
def test_counts_are_prefixes_within_one_map_and_not_between_two() -> None:
    made, image = build(), torch.randn(1, 36, 16)
    soft = {count: read(made, image, count)[0] for count in range(1, 25)}
    for low, high in ((1, 3), (4, 8), (9, 24)):
        for count in range(low, high + 1):
            torch.testing.assert_close(soft[count], soft[high][:count], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(soft[3], soft[4][:3], atol=1e-2)
    assert not torch.allclose(soft[8][4:], soft[9][4:8], atol=1e-2)


@pytest.mark.parametrize(
    ("grid", "cells"), [((6, 6), ((4, (2, 2)), (9, (3, 3)))), ((4, 8), ((2, (1, 2)), (8, (2, 4))))]
)
@torch.no_grad()
def test_anchors_are_the_pooled_map_behind_the_projector(grid: tuple[int, int], cells: tuple) -> None:
    made, image = (
        build(grid, compressor={"anchors": [size for size, _ in cells]}),
        torch.randn(2, grid[0] * grid[1], 16),
    )
    patches = image.unflatten(1, grid).permute(0, 3, 1, 2)
    for size, (rows, columns) in cells:
        means = functional.avg_pool2d(patches, (grid[0] // rows, grid[1] // columns)).flatten(2).transpose(1, 2)
        for count in (size, size + 3):
            tokens = read(made, image, count, count)[:, :size]
            torch.testing.assert_close(tokens, made.projector(means), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_queries_depend_on_anchors_features_and_where_they_are() -> None:
    made, image = build(), torch.randn(1, 36, 16)
    before = read(made, image, 12)[0, 9:]
    assert not torch.allclose(read(made, image.flip(1), 12)[0, 9:], before, atol=1e-3)
    for attention in (made.anchor_attn, made.feature_attn):
        kept = attention.out_proj.weight.clone()
        attention.out_proj.weight.zero_()
        assert not torch.allclose(read(made, image, 12)[0, 9:], before, atol=1e-3)
        attention.out_proj.weight.copy_(kept)


@pytest.mark.parametrize("count", [1, 2, 4, 7, 9, 24])
def test_every_parameter_takes_part_at_every_count_in_training(count: int) -> None:
    """Else processes with other counts would wait for this one's gradients for ever."""
    made = build().train()
    read(made, torch.randn(1, 36, 16), count).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    used = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    if count in (7, 24):
        assert used == set(gradients)
    if count in (1, 4, 9):
        assert all(name.startswith("projector") for name in used)
    queries = made.query.grad
    assert queries is not None
    assert queries.any(dim=1).tolist() == [number < num_queries(count, (1, 4, 9)) for number in range(15)]


def test_sizes_by_default_and_what_they_need() -> None:
    for budgets, anchors, most in (
        ([256, 64, 16, 1], (1, 16, 64), 256),
        ([80, 65, 63], (1, 16, 64), 80),
        ([64, 63], (1, 16), 64),
        ([16, 15], (1,), 16),
        ({"start": 3, "stop": 22, "step": 2}, (1, 16), 21),
    ):
        image = {"compressor": "hybrid", "budgets": budgets}
        assert medium("image", image).anchors == anchors
        assert one_space("image", image).max_tokens == most
    assert [num_queries(count, (1, 4, 9)) for count in (1, 3, 4, 8, 9, 12)] == [0, 2, 0, 4, 0, 3]
    assert one_space("image", SETTINGS).max_tokens == 24
    assert len(build().query) == 15
    assert len(build(budgets=[10, 8]).query) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compressor": {"anchors": [4, 25]}},
            r"model.image.compressor.anchors is \[4, 25\]; allowed are counts 1..24",
        ),
        ({"compressor": {"anchors": [0]}}, r"model.image.compressor.anchors is \[0\]; allowed are counts 1..24"),
        (
            {"compressor": {"num_queries": 3}},
            "model.image.compressor.num_queries goes with kind query, not with hybrid, which takes anchors, num_heads",
        ),
        ({"budgets": [9, 4, 1]}, r"budgets train 0 queries behind anchors \[1, 4, 9\], and 8 tokens take 4; add 8"),
        ({"budgets": [10, 4, 1]}, r"budgets train 1 queries behind anchors \[1, 4, 9\], and 8 tokens take 4; add 8"),
        (
            {"compressor": {"anchors": [2]}, "budgets": [2, 1]},
            r"budgets train 0 queries behind anchors \[1, 2\], and 3 tokens take 1; add 3",
        ),
        ({"projector": {"per_budget": True}}, "model.image.projector.per_budget does not go with compressor hybrid"),
        ({"compressor": {"keys": "content"}}, "model.image.compressor.keys goes with kind query, not with hybrid"),
        ({"budgets": ["/4"]}, r"model.image.budgets are rates \(/4\); images take counts"),
        ({"compressor": {"num_heads": 3}}, "must be a multiple of 4 and of compressor.num_heads=3"),
        ({"grid": (2, 4)}, "9 cannot be pooled of a grid of 2x4"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_streams_and_a_grid_per_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.audio\.compressor\.kind is 'hybrid'; allowed: pool, query, stack"):
        medium("audio", {**SETTINGS, "budgets": ["/4"]})
    with pytest.raises(ValueError, match=r"kind hybrid needs one grid, and here each image has its own; allowed: pool"):
        build_compressor("image", medium("image", SETTINGS), in_size=16, out_size=10, grid=(6, 6), max_patches=36)


def test_a_whole_model_answers_at_any_count() -> None:
    config = tiny.settings(("image",), image={"compressor": "hybrid", "budgets": [1, 4, 16, 64]})
    model, processor = tiny.model(config), tiny.processor(config)
    batch = tiny.batch(processor, [([tiny.random_media("image"), "what is it?"], "red")])
    for count in (1, 15, 16, 40, 64):
        inputs = processor.expand(batch, [[Budget.parse(f"image={count}")]], left_padding=True).inputs
        assert int(inputs["num_image_tokens"]) == count
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"allowed are counts 1\.\.64"):
        processor.expand(batch, [[Budget.parse("image=65")]], left_padding=True)
