"""Computes what a mean cost buys under policies that choose budgets, with intervals over media.

Knows arrays of costs and utilities. Does not know routers, budgets or answers.

A family of policies (a router at many prices) gives points of mean cost and mean utility. Between two of its points lie
the random mixtures of both, so a family is a broken line, and its points below the line between others are of no use.
Which points are used is decided on calibration data and judged on test data, for otherwise the best of many prices
would be found by luck; the hull of fixed budgets is taken on the test data, which flatters nobody but the baseline.

Shapes: G points of a family, V of them in use, n questions, U units (images or clips), R bootstrap samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mllm.router.table import Array

NUM_LOG_STEPS = 200
"""Steps of the mean over log costs."""


class Crossing(NamedTuple):
    """Says where a curve first reaches a utility: between vertex `index` and the next, at a share of the way."""

    index: int
    fraction: float

    def of(self, values: Array) -> float:
        """Read off another value of the vertices (V) there."""
        if self.fraction == 0:
            return float(values[self.index])
        return float((1 - self.fraction) * values[self.index] + self.fraction * values[self.index + 1])


@dataclass(frozen=True)
class Curve:
    """Holds the vertices of a broken line by rising cost: (V) mean costs, mean utilities, and which points they are."""

    costs: Array
    utilities: Array
    points: NDArray[np.intp]

    @classmethod
    def through(cls, costs: Array, utilities: Array) -> "Curve":
        """Draw the line through points (G) in any order, leaving out those that a cheaper one is as good as."""
        order = np.lexsort((-utilities, costs))
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(utilities[order])[:-1]])
        points = order[utilities[order] > best_before]
        return cls(costs[points], utilities[points], points)

    def utility_at(self, cost: float) -> float:
        """Read off the mean utility at a mean cost; what is above the dearest vertex is not spent."""
        return float(np.interp(cost, self.costs, self.utilities))

    def crossing(self, utility: float) -> Crossing | None:
        """Find where a utility is first reached; None where it never is."""
        reached = np.flatnonzero(self.utilities >= utility)
        if len(reached) == 0:
            return None
        index = int(reached[0])
        if index == 0:
            return Crossing(0, 0.0)
        low, high = self.utilities[index - 1], self.utilities[index]
        return Crossing(index - 1, float((utility - low) / (high - low)))

    def cost_of(self, utility: float) -> float:
        """Find the mean cost at which a mean utility is reached; infinity where it never is."""
        crossing = self.crossing(utility)
        return math.inf if crossing is None else crossing.of(self.costs)

    def mean_over_log_cost(self, low: float, high: float) -> float:
        """Average the utility over the logarithm of the cost between two costs."""
        grid = np.geomspace(low, high, NUM_LOG_STEPS)
        return float(np.interp(grid, self.costs, self.utilities).mean())


def hull_of(costs: Array, utilities: Array) -> list[int]:
    """List the points (G) on the upper concave hull, from the cheapest to the one with the largest utility.

    These are the policies worth mixing: every other one costs more than a mixture of two of these that is as good.
    """
    hull = hull_to_dearest(costs, utilities)
    best = int(np.argmax(utilities[hull]))  # the cheapest of equals
    return hull[: best + 1]


def hull_to_dearest(costs: Array, utilities: Array) -> list[int]:
    """List the points (G) on the upper concave hull, from the cheapest to the dearest, which may be worse than others.

    Behind the best point on some data the hull falls to the dearest point. Elsewhere that stretch may rise: a policy
    that costs a little more than the best one here is the next to take where the best one there is another.
    """
    hull: list[int] = []
    for point in np.lexsort((-utilities, costs)).tolist():
        if hull and costs[point] == costs[hull[-1]]:
            continue
        while len(hull) >= 2 and _is_below(costs, utilities, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_below(costs: Array, utilities: Array, left: int, middle: int, right: int) -> bool:
    """Tell whether the middle one of three points lies on or below the line between the others."""
    rise = (utilities[middle] - utilities[left]) * (costs[right] - costs[left])
    return bool(rise <= (utilities[right] - utilities[left]) * (costs[middle] - costs[left]))


def gap_closed(curve: Curve, baseline: Curve, ceiling: Curve, cost: float) -> float:
    """Compute how much of the way from a baseline to a ceiling a curve goes at a cost; nan where there is no way."""
    low, high = baseline.utility_at(cost), ceiling.utility_at(cost)
    return (curve.utility_at(cost) - low) / (high - low) if high > low else math.nan


# ---- bootstrap over units ----


@dataclass(frozen=True)
class UnitSums:
    """Holds sums over the questions of each unit, (G, U), and the number of its questions (U)."""

    costs: Array
    utilities: Array
    num_questions: Array

    @classmethod
    def of(cls, costs: Array, utilities: Array, units: Sequence[NDArray[np.intp]]) -> "UnitSums":
        """Sum costs and utilities (G, n) over units."""
        sums = [np.stack([values[:, rows].sum(axis=1) for rows in units], axis=1) for values in (costs, utilities)]
        return cls(sums[0], sums[1], np.array([len(rows) for rows in units], float))

    def means(self, weights: Array) -> tuple[Array, Array]:
        """Compute mean cost and utility (R, G) of questions when units count so often (R, U)."""
        totals = (weights @ self.num_questions)[:, None]
        return weights @ self.costs.T / totals, weights @ self.utilities.T / totals


def bootstrap_weights(num_units: int, num_samples: int, *, seed: int) -> Array:
    """Draw how often each unit counts (R, U), with replacement; the first row is the sample itself.

    All families are judged on the same draws, so their differences are paired.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_samples)
    return np.concatenate([np.ones((1, num_units)), drawn.astype(float)])


class Interval(NamedTuple):
    """Holds a value and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def interval_of(values: Sequence[float]) -> Interval:
    """Make an interval of a value, the first, and its bootstrap samples; infinity counts as the largest value."""
    samples = np.asarray(values[1:], float)
    samples = np.sort(samples[~np.isnan(samples)])
    if len(samples) == 0:
        return Interval(values[0], math.nan, math.nan)
    # The nearest sample, not a value between two, since between a number and infinity there is none.
    low, high = (samples[round(share * (len(samples) - 1))] for share in (0.025, 0.975))
    return Interval(float(values[0]), float(low), float(high))
