"""What is done to weights that wait is done to them in the end, by the same operations and so bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from mllm.checkpoints.deferred import DeferredWeights

VALUES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Reads:
    """Gives a tensor, and counts how often."""

    def __init__(self, values: Tensor = VALUES) -> None:
        self.values, self.count = values, 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self.values.clone()


def waiting(weights: DeferredWeights, read: Reads) -> Tensor:
    return weights.stand_in(read.values.shape, read.values.dtype, read)


OPERATIONS = {
    "a cast": lambda one: one.to(torch.bfloat16),
    "experts put together": lambda one: torch.cat([torch.stack([one, one * 2]), torch.stack([one + 1, one])], dim=1),
    "experts taken apart": lambda one: [
        piece.squeeze(0) for piece in torch.chunk(torch.stack([one, one * 2, -one]), 3, dim=0)
    ],
    "halves": lambda one: [half.contiguous() for half in one.chunk(2, dim=1)],
    "a view of what is turned": lambda one: one.reshape(2, 3, 4).transpose(1, 2).reshape(6, 4).contiguous(),
    "padding": lambda one: torch.cat([one, one.new_zeros(2, 4)]),
    "rows": lambda one: one[torch.tensor([4, 0])],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_waits_gives_what_it_gives_at_once(name: str) -> None:
    weights, read = DeferredWeights(), Reads()
    with weights:
        made = OPERATIONS[name](waiting(weights, read))
    assert read.count == 0
    for one, expected in zip(
        *(x if isinstance(x, list) else [x] for x in (made, OPERATIONS[name](VALUES))), strict=True
    ):
        computed = weights.compute(one)
        assert (one.shape, one.dtype, one.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
        assert computed.dtype == expected.dtype
        assert computed.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_in_place_is_that_of_the_weight_whoever_holds_it(dtype: torch.dtype) -> None:
    weights, read = DeferredWeights(), Reads(VALUES.to(dtype))
    up, down = torch.randn(6, 2), torch.randn(2, 4)
    layer, tied = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    with weights, torch.no_grad():
        layer.weight = tied.weight = nn.Parameter(waiting(weights, read))
        weights.hold([up, down])
        layer.weight.data += (up @ down) * 2.0
        layer.to("cpu")
    assert read.count == 0
    expected = VALUES.to(dtype, copy=True)
    expected += (up @ down) * 2.0
    assert weights.compute(layer.weight).equal(expected)
    assert weights.compute(tied.weight).equal(expected)
    assert layer.weight.untyped_storage().nbytes() == expected.element_size()


def test_what_replaces_a_weight_is_rounded_to_it_and_the_old_one_is_not_read() -> None:
    weights, old, new = DeferredWeights(), Reads(VALUES.bfloat16()), Reads(VALUES + 1)
    with weights:
        weight = waiting(weights, old)
        weight.copy_(waiting(weights, new))
    assert weights.compute(weight).equal((VALUES + 1).bfloat16())
    assert (old.count, new.count) == (0, 1)


def test_a_tensor_in_memory_gets_its_numbers_at_once() -> None:
    weights, read = DeferredWeights(), Reads()
    target = torch.zeros(6, 4)
    with weights:
        target.copy_(waiting(weights, read) * 3)
    assert target.equal(VALUES * 3)
    assert weights.compute(target) is target


def test_pieces_of_one_tensor_are_computed_together() -> None:
    weights, read = DeferredWeights(), Reads()
    with weights:
        pieces = torch.chunk(torch.stack([waiting(weights, read)] * 3), 3)
    assert torch.cat([weights.compute(piece) for piece in pieces]).equal(torch.stack([VALUES] * 3))
    assert read.count == 3


def test_whoever_looks_at_numbers_that_are_not_there_is_refused() -> None:
    weights = DeferredWeights()
    with weights:
        waits = waiting(weights, Reads())
        with pytest.raises(NotImplementedError, match="aten::equal"):
            torch.equal(waits, VALUES)
        with pytest.raises(NotImplementedError, match=r"aten.zero_.default writes to a part of a weight"):
            waits[:2].zero_()
        with pytest.raises(NotImplementedError, match=r"aten.mul_.Tensor writes to a part of a weight"):
            waits.mul_(2)  # a part was taken above, which would not see it
    assert waits.isnan().all()


def test_the_block_that_code_runs_in_is_known_to_it() -> None:
    outer, inner = DeferredWeights(), DeferredWeights()
    assert DeferredWeights.current() is None
    with outer:
        with inner:
            assert DeferredWeights.current() is inner
        assert DeferredWeights.current() is outer
    assert DeferredWeights.current() is None
