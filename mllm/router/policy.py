"""Decides which budget to read at: expected utility minus price times cost, before an answer and again after it.

Knows predictions and costs. Does not know models, features or how predictions come about.

`price` is the only knob: how much expected utility one more unit of cost must bring (0.005 per token: half a point of
accuracy per token). 0 buys whatever helps at all. Targets such as `quality>=0.98` are translated to a price once, on
calibration data (see `mllm.router.router`).

After an answer at budget b, growing to m > b must bring P(right at m | question, confidence) - price * (what is read in
addition) above P(right at b | question, confidence). Growth is a jump to the best m, not a ladder, and stops after
`max_growths`. Nothing here depends on other requests.

Why expected gain and not a threshold on the confidence: questions that stay uncertain at every budget would climb to
the largest for nothing (Jitkrittum et al., arXiv 2307.02764).

Shapes: n questions, K budgets from the cheapest to the dearest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mllm.router.table import Array

MAX_GROWTHS = 2


@dataclass(frozen=True)
class Predictions:
    """Holds what a router expects of n questions at K budgets.

    Args:
        before: (n, K) expected utility at each budget, knowing the question and the media.
        after: (n, K, K) expected utility at budget `after[i, b, m]` = at m, knowing also how confident the answer at b
            was. Only m >= b counts.
    """

    before: Array
    after: Array


@dataclass(frozen=True)
class Routes:
    """Holds what a policy did with n questions.

    Args:
        chosen: (n) number of the budget whose answer is returned.
        spent: (n) cost of everything that was read on the way.
        num_growths: (n) how many answers were discarded.
    """

    chosen: NDArray[np.intp]
    spent: Array
    num_growths: NDArray[np.intp]


@dataclass(frozen=True)
class Policy:
    """Chooses budgets at a price.

    Args:
        price: expected utility that one unit of cost must bring; at least 0.
        max_growths: how often an answer may be discarded for a larger budget; 0 chooses once, before any answer.

    Raises:
        ValueError: a negative price or number.
    """

    price: float
    max_growths: int = MAX_GROWTHS

    def __post_init__(self) -> None:
        if not self.price >= 0 or self.max_growths < 0:
            raise ValueError(f"price is {self.price} and max_growths {self.max_growths}; both are at least 0")

    def first(self, before: Array, cost: Array) -> NDArray[np.intp]:
        """Choose the budgets (n) to begin with from expected utilities and costs (n, K); the cheapest of equals.

        A cost of infinity marks a budget that the request cannot take.
        """
        return np.argmax(before - self._paid(cost), axis=1)

    def grow(self, now: NDArray[np.intp], after: Array, added_cost: Array) -> NDArray[np.intp]:
        """Choose the budgets (n) to go on with, `now` where the answer stays.

        Args:
            now: (n) the budgets of the answers there are.
            after: (n, K) expected utility at each budget, knowing those answers' confidence.
            added_cost: (n, K) what moving there costs in addition; what stands at `now` is not looked at.
        """
        columns = np.arange(after.shape[1])
        gains = after - self._paid(added_cost)
        gains[columns < now[:, None]] = -np.inf
        gains[columns == now[:, None]] = np.take_along_axis(after, now[:, None], axis=1)[:, 0]
        return np.argmax(gains, axis=1)

    def route(self, predictions: Predictions, cost: Array, *, is_nested: bool) -> Routes:
        """Choose and grow as `Answerer` does, for questions whose answers at all budgets are known.

        Args:
            cost: (n, K).
            is_nested: a larger budget goes on from what has been read, so only the difference is paid; otherwise
                everything is read again and paid again.
        """
        rows = np.arange(len(cost))
        chosen = self.first(predictions.before, cost)
        spent = cost[rows, chosen]
        num_growths = np.zeros(len(cost), np.intp)
        for _ in range(self.max_growths):
            added = cost - cost[rows, chosen][:, None] if is_nested else cost
            grown = self.grow(chosen, predictions.after[rows, chosen], added)
            spent = spent + np.where(grown > chosen, added[rows, grown], 0.0)
            num_growths = num_growths + (grown > chosen)
            chosen = grown
        return Routes(chosen, spent, num_growths)

    def _paid(self, cost: Array) -> Array:
        # 0 times infinity is no number, and a free token still cannot be had where the budget cannot.
        return np.where(np.isinf(cost), np.inf, self.price * np.where(np.isinf(cost), 0.0, cost))


def price_grid(largest_cost: float, *, count: int = 60) -> Array:
    """List prices from 0, which spares nothing, to one at which no budget but the cheapest pays.

    The list depends on the largest budget's cost alone, and so is fixed before any answer is looked at, as a
    certificate needs it.

    Args:
        largest_cost: mean cost of the largest budget.
    """
    return np.concatenate([[0.0], np.geomspace(0.01, 30.0, count - 1) / largest_cost])
