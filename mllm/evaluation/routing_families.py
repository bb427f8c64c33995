"""Lists what policies would do with questions whose answers at all budgets are known: routers, baselines and oracles.

Knows tables of answers and predictions. Does not know how predictions are made, or what is reported.

Shapes: n questions, K budgets from the cheapest to the dearest, G settings of a family (prices or thresholds).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mllm.router.policy import Policy, Predictions
from mllm.router.table import AnswerTable, Array, Unit


@dataclass(frozen=True)
class Reads:
    """Holds what one policy did: (n) the budget whose answer is returned, and (n, K) which were read on the way."""

    chosen: NDArray[np.intp]
    is_read: NDArray[np.bool_]

    @classmethod
    def once(cls, chosen: NDArray[np.intp], num_budgets: int) -> "Reads":
        """Make the reads of a policy that answers at one budget and no other."""
        return cls(chosen, np.arange(num_budgets) == chosen[:, None])

    def utility(self, table: AnswerTable) -> Array:
        """Return the utility (n) of the answers that are returned."""
        return np.take_along_axis(table.utility, self.chosen[:, None], axis=1)[:, 0]

    def cost(self, table: AnswerTable, unit: Unit, *, is_nested: bool) -> Array:
        """Bill everything that was read (n).

        Tokens of nested budgets are read once: a larger budget goes on from a smaller one. FLOPs and milliseconds are
        those of whole requests, summed over all that were made: a little more than a model needs that keeps what it
        has encoded.
        """
        cost = np.where(self.is_read, table.cost(unit), 0.0)
        return cost.max(axis=1) if unit == "tokens" and is_nested else cost.sum(axis=1)

    def take(self, rows: NDArray[np.intp]) -> "Reads":
        """Return those of some questions."""
        return Reads(self.chosen[rows], self.is_read[rows])


def fixed_reads(table: AnswerTable) -> list[Reads]:
    """Answer every question at one budget, for each of the budgets."""
    num_budgets = len(table.budgets)
    return [Reads.once(np.full(len(table), number), num_budgets) for number in range(num_budgets)]


def kind_reads(known: AnswerTable, table: AnswerTable, prices: Sequence[float], unit: Unit) -> list[Reads]:
    """Answer all questions of a task and kind at the budget that is best for these on a table, at each price.

    Args:
        known: where the best budget is looked up. With the table itself this is the most that telling kinds apart can
            bring, without the luck of an oracle that picks among several guesses at one question.
        table: the questions; one of a kind that `known` does not hold gets the largest budget.
    """
    kinds, known_kinds = _kinds_of(table), np.array(_kinds_of(known))
    reads = []
    for price in prices:
        gains = known.utility - price * known.cost(unit)
        best = {kind: int(np.argmax(gains[known_kinds == kind].mean(axis=0))) for kind in set(known_kinds.tolist())}
        chosen = np.array([best.get(kind, len(table.budgets) - 1) for kind in kinds], np.intp)
        reads.append(Reads.once(chosen, len(table.budgets)))
    return reads


def _kinds_of(table: AnswerTable) -> list[str]:
    return [f"{task} {kind}".strip() for task, kind in zip(table.tasks, table.kinds, strict=True)]


def router_reads(
    table: AnswerTable, predictions: Predictions, policies: Sequence[Policy], unit: Unit, *, is_nested: bool
) -> list[Reads]:
    """Follow policies through a table, as an answerer does."""
    return [_follow(table, predictions, policy, unit, is_nested=is_nested) for policy in policies]


def _follow(table: AnswerTable, predictions: Predictions, policy: Policy, unit: Unit, *, is_nested: bool) -> Reads:
    cost, rows = table.cost(unit), np.arange(len(table))
    is_read = np.zeros(cost.shape, bool)
    chosen = np.zeros(len(table), np.intp)
    for num_growths in range(policy.max_growths + 1):  # the same policy, looked at after every growth
        stopped = replace(policy, max_growths=num_growths)
        chosen = stopped.route(predictions, cost, is_nested=is_nested).chosen
        is_read[rows, chosen] = True
    return Reads(chosen, is_read)


def threshold_reads(table: AnswerTable, thresholds: Sequence[float]) -> list[Reads]:
    """Go from the cheapest budget to the next until an answer is confident enough: the usual way."""
    reads, columns = [], np.arange(len(table.budgets))
    for threshold in thresholds:
        is_enough = table.confidence >= threshold
        is_enough[:, -1] = True
        chosen = np.argmax(is_enough, axis=1)
        reads.append(Reads(chosen, columns <= chosen[:, None]))
    return reads


def oracle_reads(table: AnswerTable, prices: Sequence[float], unit: Unit, *, known: Array | None = None) -> list[Reads]:
    """Answer every question at the budget that turns out best, at each price: what nothing can beat.

    Args:
        known: (n, K) utilities of other answers to the same questions, sampled independently. Budgets are then chosen
            by these and judged by the table's, so that lucky guesses count as what they are.
    """
    utility = table.utility if known is None else known
    gains = [utility - price * table.cost(unit) for price in prices]
    return [Reads.once(np.argmax(gain, axis=1), len(table.budgets)) for gain in gains]
