"""Shares one cap out among several media by what more tokens of each would bring, exactly.

Knows costs and utilities of items. Does not know models or how utilities are predicted.

Without utilities `total<=N` gives all items of a medium one budget, and the split with the most tokens wins
(`mllm.budget.count_tokens`). With them every item has a budget of its own, and the split with the largest sum of
utilities wins. That is a knapsack with one choice per item, solved by dynamic programming over the tokens that are
left: n items, K choices each and T tokens take n * K * T steps, in units of what all costs are multiples of. The greedy
way along each item's concave hull is exact at its corners alone, so it is not taken.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mllm.budget import Budget, Extent, Space, TokenCount
from mllm.budget.space import choices_of


def allocate(costs: Sequence[Sequence[int]], utilities: Sequence[Sequence[float]], total: int) -> list[int]:
    """Choose one option per item so that the sum of utilities is largest and the sum of costs within a cap.

    Between equal sums the one that costs less wins, and then the one in which earlier items cost more.

    Args:
        costs: of each item's options, in tokens; items may have different numbers of options.
        utilities: of the same options; finite.
        total: the cap.

    Returns:
        The number of the option of each item.

    Raises:
        ValueError: the cheapest options together are above the cap.
    """
    assert [len(item) for item in costs] == [len(item) for item in utilities]
    assert all(math.isfinite(utility) for item in utilities for utility in item)
    least = [min(item) for item in costs]
    if sum(least) > total:
        raise ValueError(f"total<={total} cannot be met: the smallest split of this request takes {sum(least)} tokens")
    # Costs are counted from each item's cheapest option on and in units of their common divisor: few steps are left.
    extras = [[cost - low for cost in item] for item, low in zip(costs, least, strict=True)]
    unit = math.gcd(*(extra for item in extras for extra in item)) or 1
    most = sum(max(item) for item in extras)
    num_units = min(total - sum(least), most) // unit
    # best[t], spent[t]: utility and cost of the later items with t units to spend; chosen: each item's option at t.
    best, spent = np.zeros(num_units + 1), np.zeros(num_units + 1, np.int64)
    chosen: list[np.ndarray] = []
    for item, item_utilities in zip(reversed(extras), reversed(utilities), strict=True):
        best, spent, option = _with_item(best, spent, [extra // unit for extra in item], item_utilities)
        chosen.append(option)
    options, left = [], num_units
    for item, option in zip(extras, reversed(chosen), strict=True):
        options.append(int(option[left]))
        left -= item[options[-1]] // unit
    return options


def _with_item(
    best: np.ndarray, spent: np.ndarray, costs: Sequence[int], utilities: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put an item before those that are solved: the new `best` and `spent`, and its option at every number of units."""
    new_best, new_spent = np.full_like(best, -np.inf), np.zeros_like(spent)
    option = np.zeros(len(best), np.int64)
    # The dearest first: an option replaces another only if it is strictly better, so equals leave more to this item.
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        cost = costs[number]
        if cost >= len(best):
            continue
        value = best[: len(best) - cost] + utilities[number]
        total = spent[: len(spent) - cost] + cost
        is_better = (value > new_best[cost:]) | ((value == new_best[cost:]) & (total < new_spent[cost:]))
        new_best[cost:] = np.where(is_better, value, new_best[cost:])
        new_spent[cost:] = np.where(is_better, total, new_spent[cost:])
        option[cost:] = np.where(is_better, number, option[cost:])
    return new_best, new_spent, option


def count_tokens_by_utility(
    extents: Sequence[Extent], budget: Budget, space: Space, utility: Callable[[int, TokenCount], float]
) -> list[TokenCount]:
    """Count the soft tokens of every medium of a request under `total<=N`, each item at the budget that suits it.

    Options are what `count_tokens` would let the item take alone: trained amounts of media that the budget does not
    name, caps on tiles, frames. A budget that names an amount leaves no choice of it.

    Args:
        extents: of the request, in order.
        budget: with a cap.
        utility: what item number i is worth at a count; sums of it are compared.

    Raises:
        ValueError: a budget without a cap, a medium the model does not take, an amount that cannot be met, or a cap
            that nothing meets.
    """
    if budget.total_tokens is None:
        raise ValueError(f"budget {str(budget)!r} caps nothing; add total<=N to share N tokens out")
    space.check(budget)
    choices = [choices_of(extent, budget, space) for extent in extents]
    costs = [[count.tokens for count in item] for item in choices]
    utilities = [[utility(number, count) for count in item] for number, item in enumerate(choices)]
    options = allocate(costs, utilities, budget.total_tokens)
    return [item[option] for item, option in zip(choices, options, strict=True)]
