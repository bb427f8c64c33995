"""A cap is shared out among media as a search of all splits would, by what tokens bring to each."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from blocks import space

from mllm.budget import Budget, Extent, TokenCount, count_tokens
from mllm.router.allocation import allocate, count_tokens_by_utility

SPACE = space(
    image={"budgets": [1, 4, 16, 64]},
    audio={"compressor": "pool", "budgets": ["/4", "/8", "/16"]},
)
IMAGE = Extent("image", grid=(8, 8))
AUDIO = Extent("audio", num_frames=101, frames_per_second=50.0)


def best_split(
    costs: Sequence[Sequence[int]], utilities: Sequence[Sequence[float]], total: int
) -> tuple[float, int, tuple[int, ...]] | None:
    """The best of all splits by the rule in words: most utility, then fewest tokens, then earlier items cost more."""
    best: tuple[float, int, tuple[int, ...]] | None = None
    for options in itertools.product(*(range(len(item)) for item in costs)):
        taken = tuple(item[option] for item, option in zip(costs, options, strict=True))
        utility = sum(item[option] for item, option in zip(utilities, options, strict=True))
        if sum(taken) <= total and (best is None or (utility, -sum(taken), taken) > best):
            best = (utility, -sum(taken), taken)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_splits_are_those_of_a_search_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, utilities = [], []
    for _ in range(rng.integers(1, 5)):
        count, scale = rng.integers(1, 5), int(rng.choice([1, 1, 4]))
        costs.append([scale * int(cost) for cost in rng.choice(np.arange(1, 30), count, replace=False)])
        # Eighths, whose sums are exact, and few of them, so that there are ties.
        utilities.append((rng.integers(0, 6, count) / 8).tolist())
    least, most = (sum(map(chosen, costs)) for chosen in (min, max))
    for total in {least, least + 1, (least + most) // 2, most, 10 * most}:
        options = allocate(costs, utilities, int(total))
        taken = tuple(item[option] for item, option in zip(costs, options, strict=True))
        utility = sum(item[option] for item, option in zip(utilities, options, strict=True))
        assert (utility, -sum(taken), taken) == best_split(costs, utilities, int(total))


def test_a_concave_hull_would_miss_what_the_exact_split_finds() -> None:
    """The middle option lies below the line between the others, where the greedy way along the hull never looks."""
    costs, utilities = [[0, 5, 10], [0, 4]], [[0.0, 0.4, 1.0], [0.0, 0.3]]
    assert allocate(costs, utilities, 9) == [1, 1]


def test_sixteen_images_and_thousands_of_tokens_take_no_search() -> None:
    rng = np.random.default_rng(0)
    costs = [[1, 16, 64, 256, 576]] * 16
    utilities = [np.sort(rng.random(5)).tolist() for _ in costs]
    options = allocate(costs, utilities, 4096)
    assert sum(item[option] for item, option in zip(costs, options, strict=True)) <= 4096
    # No exchange between two items that fits makes it better.
    value = sum(item[option] for item, option in zip(utilities, options, strict=True))
    for first, second in itertools.combinations(range(16), 2):
        for pair in itertools.product(range(5), repeat=2):
            other = list(options)
            other[first], other[second] = pair
            if sum(item[option] for item, option in zip(costs, other, strict=True)) <= 4096:
                assert sum(item[option] for item, option in zip(utilities, other, strict=True)) <= value + 1e-9


def test_a_cap_below_the_cheapest_split_is_refused() -> None:
    with pytest.raises(ValueError, match="total<=7 cannot be met: the smallest split of this request takes 8 tokens"):
        allocate([[4, 16], [4, 64]], [[0.1, 0.2], [0.1, 0.2]], 7)


def test_images_of_one_request_get_budgets_of_their_own() -> None:
    """The first image is read by few tokens; without utilities both images have the same budget, as ever."""
    gains = [{1: 0.9, 4: 0.9, 16: 0.9, 64: 0.9}, {1: 0.1, 4: 0.2, 16: 0.5, 64: 0.95}]

    def utility(item: int, count: TokenCount) -> float:
        return gains[item][count.tokens]

    budget = Budget.parse("total<=70")
    assert [c.tokens for c in count_tokens_by_utility([IMAGE, IMAGE], budget, SPACE, utility)] == [1, 64]
    assert [c.tokens for c in count_tokens([IMAGE, IMAGE], budget, SPACE)] == [16, 16]


def test_amounts_that_are_named_stay_and_every_count_is_one_that_count_tokens_gives() -> None:
    def utility(_: int, count: TokenCount) -> float:
        return float(count.tokens)

    budget = Budget.parse("image=4,total<=20")
    assert count_tokens_by_utility([AUDIO, IMAGE], budget, SPACE, utility) == [TokenCount(12, 8), TokenCount(4)]
    # One item of each medium, as many tokens as can be: the rule without a router.
    budget = Budget.parse("total<=60")
    assert count_tokens_by_utility([IMAGE, AUDIO], budget, SPACE, utility) == count_tokens(
        [IMAGE, AUDIO], budget, SPACE
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("image=4", "budget 'image=4' caps nothing; add total<=N"),
        ("total<=6", "the smallest split of this request takes 7 tokens"),
        ("video=/2,total<=60", "does not take video; it takes image, audio"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(budget: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_tokens_by_utility([IMAGE, AUDIO], Budget.parse(budget), SPACE, lambda _, count: float(count.tokens))
