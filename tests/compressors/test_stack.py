"""What stacking and projectors promise: neighbours side by side, and each item through the projector of its budget."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.compressors import Pool, Projector, ProjectorBank, Stack

SIZE, OUT = 3, 4


def bank(*budgets: int, in_sizes: tuple[int, ...] = ()) -> ProjectorBank:
    torch.manual_seed(0)
    sizes = in_sizes or tuple(SIZE for _ in budgets)
    projectors = [Projector(in_size=size, out_size=OUT, hidden_size=5, norm=True, activation="relu") for size in sizes]
    return ProjectorBank(projectors, budgets=budgets)


def stack(*rates: int) -> Stack:
    return Stack(projectors=bank(*rates, in_sizes=tuple(SIZE * rate for rate in rates)))


def clips(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random clips padded with NaN, so that any use of the padding shows."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.full((len(lengths), max(lengths), SIZE), float("nan"))
    for clip, length in zip(batch, lengths, strict=True):
        clip[:length] = torch.randn(length, SIZE, generator=generator)
    return batch, torch.tensor(lengths)


@torch.no_grad()
def test_each_token_is_the_projection_of_its_window_and_the_remainder_is_dropped() -> None:
    compressor = stack(2, 3)
    clip, lengths = clips(11)
    for branch, rate in enumerate((2, 3)):
        count = 11 // rate
        windows = [clip[0, start * rate : (start + 1) * rate].flatten() for start in range(count)]
        expected = compressor.projectors[branch](torch.stack(windows))
        soft = compressor(clip, lengths, tokens=torch.tensor([count]), rates=torch.tensor([rate]), max_tokens=count)
        torch.testing.assert_close(soft[0], expected)


@torch.no_grad()
def test_an_item_in_a_mixed_batch_equals_the_item_alone() -> None:
    compressor = stack(2, 4)
    batch, lengths = clips(11, 5, 4)
    tokens, rates = torch.tensor([2, 2, 1]), torch.tensor([4, 2, 4])
    together = compressor(batch, lengths, tokens=tokens, rates=rates, max_tokens=9)
    assert together.shape == (3, 9, OUT)
    for row, (length, count) in enumerate(zip(lengths.tolist(), tokens.tolist(), strict=True)):
        one = slice(row, row + 1)
        alone = compressor(batch[one, :length], lengths[one], tokens=tokens[one], rates=rates[one], max_tokens=count)
        torch.testing.assert_close(together[row, :count], alone[0])
        assert not together[row, count:].any()


@torch.no_grad()
def test_a_grid_is_stacked_by_blocks_in_reading_order() -> None:
    projectors = bank(8, in_sizes=(SIZE * 3,))
    compressor = Stack(projectors=projectors, grid_rows=(2,), grid=(2, 12))
    image = torch.randn(1, 24, SIZE)
    blocks = image[0].unflatten(0, (2, 12)).unfold(1, 3, 3)  # (2, 4, D, 3)
    expected = projectors[0](blocks.transpose(2, 3).flatten(2).flatten(0, 1))
    soft = compressor(image, torch.tensor([24]), tokens=torch.tensor([8]), rates=torch.tensor([0]), max_tokens=8)
    torch.testing.assert_close(soft[0], expected)


@torch.no_grad()
def test_square_blocks_are_the_pixel_shuffle() -> None:
    """Same numbers as torch's `pixel_unshuffle`, which orders channels first inside a block."""
    projectors = bank(4, in_sizes=(SIZE * 4,))
    compressor = Stack(projectors=projectors, grid_rows=(2,), grid=(4, 4))
    image = torch.randn(1, 16, SIZE)
    grids = functional.pixel_unshuffle(image.transpose(1, 2).unflatten(2, (4, 4)), 2)[0]  # (D * 4, 2, 2)
    blocks = grids.unflatten(0, (SIZE, 4)).transpose(0, 1).flatten(0, 1).flatten(1).T
    soft = compressor(image, torch.tensor([16]), tokens=torch.tensor([4]), rates=torch.tensor([0]), max_tokens=4)
    torch.testing.assert_close(soft[0], projectors[0](blocks))


@pytest.mark.parametrize("by_rate", [True, False])
def test_each_item_goes_through_the_projector_of_its_budget_and_teaches_no_other(by_rate: bool) -> None:
    """Every projector has a gradient (an exact zero where no item asked for it): no process waits for a missing one."""
    projectors = bank(2, 4, 8)
    compressor = Pool(projectors=projectors)
    clip, lengths = clips(16)
    for chosen, budget in enumerate((2, 4, 8)):
        compressor.zero_grad()
        tokens = torch.tensor([16 // budget if by_rate else budget])
        rates = torch.tensor([budget if by_rate else 0])
        soft = compressor(clip, lengths, tokens=tokens, rates=rates, max_tokens=8)
        means = clip[0].unflatten(0, (int(tokens), -1)).mean(dim=1)
        torch.testing.assert_close(soft[0, : int(tokens)], projectors[chosen](means))
        soft.sum(dim=1)[..., 0].sum().backward()
        for branch, projector in enumerate(projectors):
            grads = [parameter.grad for parameter in projector.parameters()]
            assert all(grad is not None for grad in grads)
            assert any(grad.any() for grad in grads) is (branch == chosen)


def test_in_a_mixed_batch_each_projector_learns_from_its_own_items() -> None:
    compressor = stack(2, 4)
    batch, lengths = clips(8, 8)
    costs = {"tokens": torch.tensor([4, 2]), "rates": torch.tensor([2, 4])}
    compressor(batch, lengths, **costs, max_tokens=4)[..., 0].sum().backward()
    mixed = [parameter.grad.clone() for parameter in compressor.parameters()]
    compressor.zero_grad()
    for row in (0, 1):
        one = {name: values[row : row + 1] for name, values in costs.items()}
        compressor(batch[row : row + 1], lengths[row : row + 1], **one, max_tokens=4)[..., 0].sum().backward()
    for together, apart in zip(mixed, (parameter.grad for parameter in compressor.parameters()), strict=True):
        torch.testing.assert_close(together, apart)


def test_a_clip_shorter_than_a_rate_still_touches_its_projector() -> None:
    compressor = stack(2, 8)
    clip, lengths = clips(3)
    compressor(clip, lengths, tokens=torch.tensor([1]), rates=torch.tensor([2]), max_tokens=1).sum().backward()
    assert all(parameter.grad is not None for parameter in compressor.parameters())


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"hidden_size": None}, ["0.weight", "0.bias"]),
        ({"hidden_size": 7}, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ({"hidden_size": 7, "norm": True}, ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]),
    ],
)
def test_projectors_have_the_published_names(kwargs: dict, names: list[str]) -> None:
    projector = Projector(in_size=SIZE, out_size=OUT, **kwargs)
    assert list(projector.state_dict()) == names
    assert projector(torch.zeros(2, 5, SIZE)).shape == (2, 5, OUT)


def test_activations_are_refused_by_name() -> None:
    assert isinstance(Projector(in_size=SIZE, out_size=OUT, hidden_size=7)[1], nn.GELU)
    with pytest.raises(ValueError, match=r"projector.activation='tanh' is not one of: gelu, relu"):
        Projector(in_size=SIZE, out_size=OUT, hidden_size=7, activation="tanh")  # pyright: ignore
