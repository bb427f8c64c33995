"""Certifies that a router loses little against the largest budget: Learn-then-Test over a fixed list of prices.

Knows losses, prices and bounds. Does not know models or features.

A price that merely looked fine on calibration data breaks its promise in about every second draw of that data. Here
every price is a hypothesis, "its mean loss is above what is allowed", that must be refuted at the same confidence.
Prices are tested in an order fixed beforehand, the safest first, until one is not refuted; the last refuted one is
used. The chance that its true loss is above what is allowed is then at most 1 - confidence, whatever the shape of the
losses; they need not grow with the price (fixed-sequence testing of Learn then Test, arXiv 2110.01052).

The unit is an image or clip, whose questions depend on each other: its loss is the mean over its questions. Losses are
in [0, 1] and are bounded by betting (Waudby-Smith and Ramdas, arXiv 2010.09686, in the form of arXiv 2101.02703), or by
the exact binomial tail where every loss is 0 or 1.

What is promised holds for requests that are exchangeable with the calibration and for the very model; nothing is said
of other kinds of questions, and nothing of being right: the loss is measured against the largest budget.

Shapes: n questions, U units, K budgets, G prices, "..." any leading dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from mllm.checkpoints.model_files import changed_files
from mllm.config.reading import plain, read
from mllm.router.policy import Policy, Predictions
from mllm.router.table import AnswerTable, Array, Unit

Loss = Literal["gap", "net"]
"""`gap` is max(0, u_largest - u_chosen): what is lost anywhere counts. `net` is u_largest - u_chosen: what a smaller
budget gets right where the largest is wrong makes up for it."""
Bound = Literal["betting", "binomial"]
MAX_UNITS = 1_000_000
"""How many units `units_needed` tries at most."""


class CalibrationTooSmall(ValueError):
    """Says that nothing can be promised. `missing_units` is None where no number of units would help."""

    def __init__(self, message: str, missing_units: int | None) -> None:
        super().__init__(message)
        self.missing_units = missing_units


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Says what is to be promised.

    Args:
        allowed_loss: the most that may be lost on average against the largest budget, in utility; 0.05 is five points.
        confidence: how surely; 0.9 lets at most one calibration in ten break it.
        bound: `binomial` is sharper by little, and only for losses that can be nothing but 0 and 1.

    Raises:
        ValueError: a number outside 0..1, or `binomial` for the net loss, which has three values.
    """

    allowed_loss: float
    confidence: float = 0.9
    loss: Loss = "gap"
    bound: Bound = "betting"

    def __post_init__(self) -> None:
        for key in ("allowed_loss", "confidence"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be between 0 and 1, both left out")
        if self.bound == "binomial" and self.loss == "net":
            raise ValueError("bound is binomial, but the net loss may also be negative; use betting")

    @property
    def delta(self) -> float:
        """The share of calibrations that may break it."""
        return 1 - self.confidence


@dataclass(frozen=True)
class Calibration:
    """Holds what a policy lost at each of G prices, on U units that it was not fitted on.

    Args:
        losses: (G, U) mean loss of each unit; in [0, 1], the net loss in [-1, 1]. The order of the units must not
            depend on their losses.
        policies: (G) safest first, all with the same number of growths. Chosen without a look at these losses.
        costs: (G) mean cost of a question.
        num_questions: of all units.
    """

    losses: Array
    policies: Sequence[Policy]
    costs: Sequence[float]
    num_questions: int

    def __post_init__(self) -> None:
        assert self.losses.shape[0] == len(self.policies) == len(self.costs), self.losses.shape
        assert len({policy.max_growths for policy in self.policies}) == 1


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Holds a promise that a calibration has proved, and what it rests on.

    Args:
        price: the dearest of `grid` that keeps the promise.
        max_growths: of the policies; another number is another policy, of which nothing is promised.
        grid: every price that could have been chosen, in the order they were tested.
        mean_loss, mean_cost: of the calibration at `price`.
        fingerprint: digests of the model's files, by name.
        sets: names of the sets that the calibration came from.
    """

    promise: Promise
    price: float
    max_growths: int
    grid: list[float]
    num_units: int
    num_questions: int
    mean_loss: float
    mean_cost: float
    fingerprint: dict[str, str]
    sets: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        promise = self.promise
        return (
            f"{promise.loss} loss against the largest budget at most {promise.allowed_loss:g} at confidence "
            f"{promise.confidence:g}, by {self.num_questions} questions about {self.num_units} images or clips"
        )

    def check(self, fingerprint: Mapping[str, str]) -> None:
        """Refuse another model than the one that was calibrated.

        Raises:
            ValueError: it is another one.
        """
        if changed := changed_files(self.fingerprint, fingerprint):
            raise ValueError(
                f"the certificate was made for another model ({', '.join(changed)} differ); calibrate anew"
            )

    def to_data(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return plain(self)

    @classmethod
    def from_data(cls, values: Any) -> "Certificate":
        """Read what `to_data` gave.

        Raises:
            ValueError: unknown or missing keys, or values of another type; the key is named.
        """
        return read(cls, values, "certificate")


# ---- losses ----


def loss_of(chosen: Array, largest: Array, loss: Loss) -> Array:
    """Compute the loss of answers from their utility and that of the largest budget's, of any shape."""
    difference = largest - chosen
    return np.maximum(difference, 0.0) if loss == "gap" else difference


def unit_means(values: Array, units: Sequence[NDArray[np.intp]]) -> Array:
    """Average values (..., n) over the questions of each unit: (..., U).

    Args:
        units: the rows of each unit, as `AnswerTable.units` lists them.
    """
    return np.stack([values[..., rows].mean(axis=-1) for rows in units], axis=-1)


def calibrate(
    table: AnswerTable,
    predictions: Predictions,
    policies: Sequence[Policy],
    *,
    loss: Loss = "gap",
    unit: Unit = "tokens",
    is_nested: bool = False,
) -> Calibration:
    """Measure what policies lose on a table.

    Args:
        table: media that the router was not fitted on.
        predictions: of this table.
        policies: safest first; their prices must not come from this table.
        unit: what prices are per.
        is_nested: see `Policy.route`.
    """
    cost, rows, units = table.cost(unit), np.arange(len(table)), table.units()
    losses, costs = [], []
    for policy in policies:
        routes = policy.route(predictions, cost, is_nested=is_nested)
        losses.append(loss_of(table.utility[rows, routes.chosen], table.utility[:, -1], loss))
        costs.append(float(routes.spent.mean()))
    return Calibration(unit_means(np.stack(losses), units), policies, costs, len(table))


# ---- bounds ----


def betting_p_values(losses: Array, allowed: float, *, delta: float) -> Array:
    """Compute p-values (...) of the hypothesis that the mean loss is above what is allowed.

    A gambler bets against it, one unit after another. Were it true, his capital would not grow on average, so that it
    reaches 1 / p with probability p at most (Ville's inequality). Bets depend on earlier units only: small where losses
    vary much, which is why the bound is sharp where they do not.

    Args:
        losses: (..., U) in [0, 1], independent, in an order that does not depend on them.
        allowed: in (0, 1).
        delta: the p-value that matters; bets are sized for it. The p-value is valid whatever it is.
    """
    count = np.arange(1, losses.shape[-1] + 1)
    # Mean and variance begin at 1/2 and 1/4, as of one unit that is as uncertain as can be.
    means = (0.5 + np.cumsum(losses, axis=-1)) / (1 + count)
    variances = (0.25 + np.cumsum((losses - means) ** 2, axis=-1)) / (1 + count)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variances[..., :-1]], axis=-1)
    # A bet of 1 leaves the capital `allowed` after a loss of 1, so that the gambler is never ruined.
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (losses.shape[-1] * before)))
    log_capital = np.cumsum(np.log1p(-bets * (losses - allowed)), axis=-1)
    return np.minimum(1.0, np.exp(-log_capital.max(axis=-1)))


def binomial_p_values(losses: Array, allowed: float) -> Array:
    """Compute exact p-values (...) where every loss (..., U) is 0 or 1.

    Raises:
        ValueError: another loss.
    """
    if not np.isin(losses, (0.0, 1.0)).all():
        raise ValueError("bound is binomial, but some losses are neither 0 nor 1; use betting")
    return binom.cdf(losses.sum(axis=-1), losses.shape[-1], allowed)


def p_values(losses: Array, promise: Promise) -> Array:
    """Compute the p-values (...) of losses (..., U) by the bound of a promise."""
    allowed = promise.allowed_loss
    if promise.loss == "net":  # from -1..1 to 0..1
        losses, allowed = (1 + losses) / 2, (1 + allowed) / 2
    if promise.bound == "binomial":
        return binomial_p_values(losses, allowed)
    return betting_p_values(losses, allowed, delta=promise.delta)


def count_refuted(p_values_G: Array, delta: float) -> NDArray[np.intp]:
    """Count how many hypotheses (..., G) are refuted in turn before the first that is not: (...)."""
    return np.logical_and.accumulate(p_values_G <= delta, axis=-1).sum(axis=-1)


# ---- certify or refuse ----


def certify(
    calibration: Calibration, promise: Promise, *, fingerprint: Mapping[str, str], sets: Sequence[str] = ()
) -> Certificate:
    """Find the dearest price that keeps a promise.

    Args:
        calibration: its losses must be of the promise's kind.
        fingerprint: of the model that answered: digests of its files, by name.
        sets: names of the sets that the calibration came from.

    Raises:
        CalibrationTooSmall: not even the safest price can be proved; the message says how many units are missing.
    """
    num_refuted = int(count_refuted(p_values(calibration.losses, promise), promise.delta))
    if num_refuted == 0:
        raise _refusal(calibration.losses[0], promise)
    chosen = num_refuted - 1
    return Certificate(
        promise=promise,
        price=calibration.policies[chosen].price,
        max_growths=calibration.policies[chosen].max_growths,
        grid=[policy.price for policy in calibration.policies],
        num_units=calibration.losses.shape[1],
        num_questions=calibration.num_questions,
        mean_loss=float(calibration.losses[chosen].mean()),
        mean_cost=float(calibration.costs[chosen]),
        fingerprint=dict(fingerprint),
        sets=list(sets),
    )


def units_needed(losses: Array, promise: Promise) -> int | None:
    """Estimate with how many units a promise could be made, if they went on like those there are.

    Args:
        losses: (U) of one price.

    Returns:
        None where more than `MAX_UNITS` would be needed, as where the losses are above what is allowed.
    """

    def suffices(count: int) -> bool:
        return bool(p_values(np.resize(losses, count), promise) <= promise.delta)

    fails, passes = 0, max(len(losses), 1)
    while not suffices(passes):
        fails, passes = passes, 2 * passes
        if passes > MAX_UNITS:
            return None
    while passes - fails > 1:
        middle = (fails + passes) // 2
        fails, passes = (fails, middle) if suffices(middle) else (middle, passes)
    return passes


def _refusal(losses: Array, promise: Promise) -> CalibrationTooSmall:
    """Say why the safest price is not proved, and how many units are missing."""
    num_units, mean = len(losses), float(losses.mean())
    what = f"a {promise.loss} loss of at most {promise.allowed_loss:g} at confidence {promise.confidence:g}"
    lost = f"the safest price loses {mean:.4g} on the {num_units} images or clips of the calibration"
    if mean >= promise.allowed_loss:
        advice = "allow more" if promise.loss == "net" else "allow more, or take the net loss"
        return CalibrationTooSmall(
            f"{what} cannot be promised: {lost}, and more of them would not help; {advice}", None
        )
    needed = units_needed(losses, promise)
    least = units_needed(np.zeros(1), promise)
    assert least is not None
    if needed is None:
        return CalibrationTooSmall(f"{what} cannot be promised: {lost}, which is too close to it to ever tell", None)
    missing = max(needed, least) - num_units
    return CalibrationTooSmall(
        f"the calibration is too small to promise {what}: {lost}; about {missing} more like these are needed, and "
        f"{least} in all even if nothing were lost",
        missing,
    )
