"""Packed rows against rows by themselves: the plan shares what may be shared, and attention by segment is exact."""

import random

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from mllm.packing.attention import by_segment, mask_function, packed_mask, segment_attention
from mllm.packing.plan import SegmentPlan, plan_rows

ROWS = [[1, 2, 3, 4, 5, 6], [1, 2, 8, 9], [1, 2, 3, 7], [5, 5, 5], [1, 2, 3, 4, 5, 6]]


def random_rows(seed: int) -> list[list[int]]:
    """Rows that branch at random places, of each other and of nothing."""
    rng = random.Random(seed)
    rows: list[list[int]] = []
    for _ in range(rng.randint(1, 9)):
        start = rng.choice([*rows, []])
        start = start[: rng.randint(0, len(start))]
        rows.append([*start, *[rng.randint(0, 2) for _ in range(rng.randint(0 if start else 1, 7))]])
    return rows


def held_by(plan: SegmentPlan, rows: list[list[int]]) -> list[int]:
    """What stands in the packed row, by who it was placed for."""
    return [rows[row][column] for row, column in zip(plan.source_rows, plan.position_ids[0], strict=True)]


def test_each_common_beginning_stands_once() -> None:
    plan = plan_rows(ROWS, least_shared=1)
    assert plan.num_tokens == 6 + 2 + 1 + 3
    packed = held_by(plan, ROWS)
    for row, places in zip(ROWS, plan.rows, strict=True):
        assert [packed[position] for position in places if position >= 0] == row
    assert torch.equal(plan.rows[0], plan.rows[4])
    assert plan.unpack(torch.tensor([packed]), -1)[1].tolist() == [1, 2, 8, 9, -1, -1]


def test_short_beginnings_and_other_groups_are_not_shared() -> None:
    assert plan_rows(ROWS, least_shared=3).num_tokens == 6 + 4 + 1 + 3
    assert plan_rows(ROWS, ["a", "a", "b", "b", "c"], least_shared=1).num_tokens == 6 + 2 + 4 + 3 + 6
    assert plan_rows(ROWS, least_shared=1, groups=[(0, 1)] * 5).num_tokens == 12


def test_the_longest_of_nested_rows_is_one_segment_and_the_others_branch_off_it() -> None:
    nested = [[7, *range(100, 100 + budget), 1, 2] for budget in (2, 8, 4)]
    plan = plan_rows(nested, least_shared=1)
    assert [(segment.length, segment.visible) for segment in plan.segments] == [
        (11, ()),
        (2, ((0, 5),)),
        (2, ((0, 3),)),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_no_more_is_kept_than_the_tree_of_the_rows_has(seed: int) -> None:
    rows = random_rows(seed)
    plan = plan_rows(rows, least_shared=1)
    nodes = {tuple(row[:length]) for row in rows for length in range(1, len(row) + 1)}
    assert plan.num_tokens == len(nodes)
    mask, packed = plan.dense_mask(), held_by(plan, rows)
    for row, places in zip(rows, plan.rows.tolist(), strict=True):
        for column, position in enumerate(places[: len(row)]):
            seen = mask[position].nonzero()[:, 0].tolist()
            assert [packed[position_seen] for position_seen in seen] == row[: column + 1]


@pytest.mark.parametrize("seed", range(4))
def test_attention_by_segment_is_that_of_the_dense_mask(seed: int) -> None:
    plan = plan_rows(random_rows(seed), least_shared=2)
    states = [torch.randn(1, 2, plan.num_tokens, 8, requires_grad=True) for _ in range(3)]
    dense = functional.scaled_dot_product_attention(*states, attn_mask=plan.dense_mask()).transpose(1, 2)
    ours = by_segment(*states, plan)
    torch.testing.assert_close(ours, dense)
    upstream = torch.randn_like(dense)
    for result, expected in zip(
        torch.autograd.grad(ours, states, upstream), torch.autograd.grad(dense, states, upstream), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "computed_in"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_a_cpu_widens_half_precision_and_narrows_nothing_autocast_or_not(
    dtype: torch.dtype, computed_in: torch.dtype
) -> None:
    plan = plan_rows(random_rows(0), least_shared=2)
    states = [torch.randn(1, 2, plan.num_tokens, 4, dtype=torch.float64).to(dtype) for _ in range(3)]
    expected = by_segment(*(state.to(computed_in) for state in states), plan).to(dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, _ = segment_attention(torch.nn.Module(), *states, None, segment_plan=plan)
        assert torch.equal(out, expected)


def test_the_mask_of_flex_attention_is_the_dense_mask() -> None:
    plan = plan_rows(random_rows(3), least_shared=1)
    position, zero = torch.arange(plan.num_tokens), torch.zeros((), dtype=torch.int64)
    allowed = mask_function(plan, torch.device("cpu"))(zero, zero, position[:, None], position)
    assert torch.equal(allowed, plan.dense_mask())
    states = [torch.randn(1, 2, plan.num_tokens, 8) for _ in range(3)]
    out = flex_attention(*states, block_mask=packed_mask(plan, torch.device("cpu"), "flex"))
    torch.testing.assert_close(out.transpose(1, 2), by_segment(*states, plan))
