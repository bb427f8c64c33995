"""Judges routers beside everything that a router has to beat, so that the comparison cannot flatter it.

Knows tables of answers, predictions and families of policies. Does not know models.

- Beside fixed budgets stand their random mixtures (the concave hull), a constant budget per kind of question, and one
  threshold on the confidence; a router whose questions were shuffled must not beat the mixtures.
- Prices are chosen on calibration data and judged on test data. Only the hull of fixed budgets is chosen on the test.
- An oracle is right by luck where several guesses are made; the best constant per kind, chosen on the test itself, is a
  ceiling without luck, and an oracle that chooses by independent answers another where there are some.
- Within one kind of question a router shows what it knows beyond telling kinds apart, and on a kind it was not fitted
  on what a shift does to it.
- Intervals are of bootstraps over images or clips, paired: all families are judged on the same draws.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm.evaluation.routing_curves import (
    Curve,
    Interval,
    UnitSums,
    bootstrap_weights,
    gap_closed,
    hull_of,
    hull_to_dearest,
    interval_of,
)
from mllm.evaluation.routing_families import (
    Reads,
    fixed_reads,
    kind_reads,
    oracle_reads,
    router_reads,
    threshold_reads,
)
from mllm.router.heads import fit_heads, folds_of, predict_out_of_fold
from mllm.router.policy import Policy, Predictions, price_grid
from mllm.router.table import AnswerTable, Array, Unit
from mllm.utils.files import write_text_whole
from mllm.utils.markdown import markdown_table

QUESTION_BLOCK = "question"
"""The block of features that a question-only router looks at, and that the control shuffles."""
MIXED, ROUTER, ORACLE = "fixed budgets, mixed at random", "router, growing by expected gain", "oracle"
BEST_CONSTANT = "best constant per kind, chosen on the test"
NO_GROWING = "no growing"
CONTROL = f"shuffled questions only, {NO_GROWING} (control)"
"""What it chooses depends on nothing about the question; growing would still see how confident answers are."""
MARKDOWN, DATA = "routing.md", "routing.json"
NUM_THRESHOLDS = 40


@dataclass(frozen=True)
class Setup:
    """Says how policies are billed and judged.

    Args:
        unit: what prices are per, and what curves are drawn over.
        is_nested: whether a larger budget goes on from what a smaller one has read.
        levels: costs at which the gap between random mixtures and the oracle is looked at.
        num_samples: of the bootstrap.
    """

    unit: Unit = "tokens"
    is_nested: bool = False
    levels: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    num_samples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Sides:
    """Holds a table to choose on and one to judge on, with what routers predict of both.

    Args:
        calibration, test: of different images or clips.
        predictions: by name of the router, of calibration and test.
        held_out: of the test, by a router that was not fitted on the kind of each question; None where there is but one
            kind.
    """

    calibration: AnswerTable
    test: AnswerTable
    predictions: Mapping[str, tuple[Predictions, Predictions]]
    held_out: Predictions | None = None


@dataclass(frozen=True)
class Family:
    """Holds what the policies of one family do.

    Args:
        test: what each policy does with the test.
        calibration: the same of the calibration, which then says which of them are in use.
        used: their numbers where that was settled before. Without either, their hull is chosen on the test.
    """

    name: str
    test: Sequence[Reads]
    calibration: Sequence[Reads] | None = None
    used: Sequence[int] | None = None

    @property
    def is_chosen_on_test(self) -> bool:
        """Tell whether the test itself says which policies are worth mixing."""
        return self.calibration is None and self.used is None

    def take(self, calibration_rows: NDArray[np.intp], test_rows: NDArray[np.intp]) -> "Family":
        """Return the same of some questions."""
        calibration = None if self.calibration is None else [one.take(calibration_rows) for one in self.calibration]
        return Family(self.name, [one.take(test_rows) for one in self.test], calibration, self.used)


@dataclass(frozen=True)
class Row:
    """Holds one line of the report.

    Args:
        points: mean cost and utility of each point in use, on the test.
        utility_over_log_cost: averaged between the cheapest and the dearest budget.
        cost_at_largest, cost_near_largest: mean cost at the utility of the largest budget, and one point below it.
        other_costs: at the utility of the largest budget, by unit.
        gap_closed: by level, from random mixtures (0) to the oracle (1).
    """

    name: str
    points: list[tuple[float, float]]
    utility_over_log_cost: Interval
    cost_at_largest: Interval
    cost_near_largest: Interval
    other_costs: dict[str, float]
    gap_closed: dict[float, Interval]


@dataclass(frozen=True)
class KindRow:
    """Holds what is gained within one kind of question.

    Args:
        best_fixed: the best mean utility of any fixed budget, and its cost.
        cost_of_router: mean cost at which the router reaches that, its price chosen within the kind.
        at_price: mean utility and cost at the price chosen for all kinds together.
        held_out: the same of a router that was not fitted on this kind.
    """

    kind: str
    num_questions: int
    best_fixed: tuple[float, float]
    cost_of_router: float
    at_price: tuple[float, float]
    held_out: tuple[float, float] | None


@dataclass(frozen=True)
class RoutingReport:
    """Holds the comparison of routers and what they have to beat."""

    setup: Setup
    largest: tuple[float, float]
    rows: list[Row]
    kinds: list[KindRow] = field(default_factory=list)

    def to_data(self) -> dict[str, Any]:
        """Return plain values; what is never reached is null."""
        return _finite(dataclasses.asdict(self))

    def to_markdown(self) -> str:
        """Write the table of all families and, where there are kinds, that of kinds."""
        return f"{_rows_table(self)}\n" + (f"\n{_kinds_table(self)}\n" if self.kinds else "")

    def write(self, folder: Path) -> None:
        """Write `routing.md` and `routing.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(folder / MARKDOWN, self.to_markdown())
        write_text_whole(folder / DATA, json.dumps(self.to_data(), indent=1, ensure_ascii=False) + "\n")


# ---- routers ----


def predict_sides(fitted: AnswerTable, test: AnswerTable, *, seed: int = 0) -> Sides:
    """Fit routers on a table and predict it, out of fold, and another one.

    Args:
        fitted: also what prices are chosen on.
        seed: of the shuffled questions of the control.

    Raises:
        ValueError: too few images or clips, or features without a block of the question.
    """
    if QUESTION_BLOCK not in fitted.features:
        raise ValueError(f"the table holds no features of the question; there are {', '.join(fitted.features)}")
    predictions = {
        f"question only, {NO_GROWING}": _predictions(fitted, test, [QUESTION_BLOCK]),
        ROUTER: _predictions(fitted, test),
        CONTROL: _predictions(
            _with_shuffled_questions(fitted, seed), _with_shuffled_questions(test, seed), [QUESTION_BLOCK]
        ),
    }
    kinds = sorted(set(fitted.kinds))
    held_out = _predict_held_out(fitted, test, kinds) if len(kinds) > 1 else None
    return Sides(fitted, test, predictions, held_out)


def _predictions(
    fitted: AnswerTable, test: AnswerTable, blocks: Sequence[str] | None = None
) -> tuple[Predictions, Predictions]:
    heads = fit_heads(fitted, blocks)
    return predict_out_of_fold(fitted, blocks), heads.predict(test.features, test.confidence)


def _with_shuffled_questions(table: AnswerTable, seed: int) -> AnswerTable:
    order = np.random.default_rng(seed).permutation(len(table))
    features = {**table.features, QUESTION_BLOCK: table.features[QUESTION_BLOCK][order]}
    return dataclasses.replace(table, features=features)


def _predict_held_out(fitted: AnswerTable, test: AnswerTable, kinds: Sequence[str]) -> Predictions | None:
    """Predict the questions of each kind by heads that were fitted on the other kinds; None where too few are left."""
    n, num_budgets = test.utility.shape
    predictions = Predictions(np.zeros((n, num_budgets)), np.zeros((n, num_budgets, num_budgets)))
    for kind in kinds:
        others = fitted.take(np.flatnonzero(np.array(fitted.kinds) != kind))
        try:
            folds_of(others)
        except ValueError:
            return None
        rows = np.flatnonzero(np.array(test.kinds) == kind)
        part = test.take(rows)
        predicted = fit_heads(others).predict(part.features, part.confidence)
        predictions.before[rows], predictions.after[rows] = predicted.before, predicted.after
    return predictions


# ---- families ----


def families_of(sides: Sides, setup: Setup, *, second: AnswerTable | None = None) -> list[Family]:
    """List every family that a report compares.

    Args:
        second: independent answers to the test's questions, for an oracle that does not choose by luck.
    """
    calibration, test, unit = sides.calibration, sides.test, setup.unit
    prices = _prices(calibration, unit)
    thresholds = thresholds_of(calibration)
    families = [
        Family(MIXED, fixed_reads(test)),
        Family(
            "constant budget per kind",
            kind_reads(calibration, test, prices, unit),
            kind_reads(calibration, calibration, prices, unit),
        ),
        Family("one confidence threshold", threshold_reads(test, thresholds), threshold_reads(calibration, thresholds)),
    ]
    for name, (of_calibration, of_test) in sides.predictions.items():
        policies = [Policy(price, max_growths=0) if NO_GROWING in name else Policy(price) for price in prices]
        judged, known = (
            router_reads(table, predictions, policies, unit, is_nested=setup.is_nested)
            for table, predictions in ((test, of_test), (calibration, of_calibration))
        )
        families.append(Family(name, judged, known))
    families.append(Family(BEST_CONSTANT, kind_reads(test, test, prices, unit)))
    if second is not None:
        chosen = oracle_reads(test, prices, unit, known=second.utility)
        families.append(Family("oracle that chooses by independent answers", chosen))
    return [*families, Family(ORACLE, oracle_reads(test, prices, unit))]


def thresholds_of(table: AnswerTable) -> list[float]:
    """List the confidences to try as thresholds: quantiles of those of a table, and infinity, which none reaches."""
    return [*np.unique(np.quantile(table.confidence, np.linspace(0, 1, NUM_THRESHOLDS))).tolist(), math.inf]


def _prices(calibration: AnswerTable, unit: Unit) -> list[float]:
    return price_grid(float(calibration.cost(unit)[:, -1].mean())).tolist()


# ---- judging ----


def judge(families: Sequence[Family], sides: Sides, setup: Setup) -> list[Row]:
    """Compute the lines of a report, with intervals over the media of the test."""
    units, test = sides.test.units(), sides.test
    weights = bootstrap_weights(len(units), setup.num_samples, seed=setup.seed)
    kept = [_points_in_use(family, sides, setup) for family in families]
    curves = {}
    for family, points in zip(families, kept, strict=True):
        costs, utilities = _points(points, test, setup)
        mean_costs, mean_utilities = UnitSums.of(costs, utilities, units).means(weights)
        curves[family.name] = [
            _curve(*of_draw, takes_hull=family.is_chosen_on_test)
            for of_draw in zip(mean_costs, mean_utilities, strict=True)
        ]
    fixed_costs, fixed_utilities = UnitSums.of(test.cost(setup.unit).T, test.utility.T, units).means(weights)
    return [
        _row(family.name, points, curves, (fixed_costs, fixed_utilities[:, -1]), test, setup)
        for family, points in zip(families, kept, strict=True)
    ]


def _points_in_use(family: Family, sides: Sides, setup: Setup) -> list[Reads]:
    """Keep the policies that are worth mixing, by the calibration, and the largest budget, which can always be had.

    Where the test itself decides, all are kept.
    """
    if family.is_chosen_on_test:
        return list(family.test)
    used = family.used
    if used is None:
        assert family.calibration is not None
        costs, utilities = _points([*family.calibration, fixed_reads(sides.calibration)[-1]], sides.calibration, setup)
        used = points_in_use(costs.mean(axis=1), utilities.mean(axis=1))
    return [*(family.test[point] for point in used), fixed_reads(sides.test)[-1]]


def points_in_use(costs: Array, utilities: Array) -> list[int]:
    """List the policies worth mixing on the way to the largest budget, which is the last of the points (G + 1).

    Not only up to the best of them: that is the best by luck, and a bootstrap sample or other data on which it falls a
    little short of the largest budget would find none of the policies between the two.
    """
    cheaper = [*np.flatnonzero(costs[:-1] < costs[-1]).tolist(), len(costs) - 1]
    hull = hull_to_dearest(costs[cheaper], utilities[cheaper])
    return [cheaper[point] for point in hull if cheaper[point] < len(costs) - 1]


def _points(reads: Sequence[Reads], table: AnswerTable, setup: Setup) -> tuple[Array, Array]:
    """Compute cost and utility (G, n) of every policy and question."""
    costs = [one.cost(table, setup.unit, is_nested=setup.is_nested) for one in reads]
    return np.stack(costs), np.stack([one.utility(table) for one in reads])


def _curve(costs: Array, utilities: Array, *, takes_hull: bool) -> Curve:
    if not takes_hull:
        return Curve.through(costs, utilities)
    hull = np.asarray(hull_of(costs, utilities), np.intp)
    return Curve(costs[hull], utilities[hull], hull)


def _row(
    name: str,
    points: Sequence[Reads],
    curves: Mapping[str, Sequence[Curve]],
    fixed: tuple[Array, Array],
    test: AnswerTable,
    setup: Setup,
) -> Row:
    """Read the line of one family off its curves, the first of which is that of the test itself.

    Args:
        points: the policies that the curves lead through.
        fixed: (R, K) mean costs of the budgets, and (R) the utility of the largest.
    """
    lines, (costs, largest) = curves[name], fixed
    ends = [(float(of_draw[0]), float(of_draw[-1])) for of_draw in costs]
    return Row(
        name=name,
        points=list(zip(lines[0].costs.tolist(), lines[0].utilities.tolist(), strict=True)),
        utility_over_log_cost=interval_of(
            [line.mean_over_log_cost(*end) for line, end in zip(lines, ends, strict=True)]
        ),
        cost_at_largest=interval_of([line.cost_of(top) for line, top in zip(lines, largest, strict=True)]),
        cost_near_largest=interval_of([line.cost_of(top - 0.01) for line, top in zip(lines, largest, strict=True)]),
        other_costs=_other_costs(points, lines[0], float(largest[0]), test, setup),
        gap_closed={
            level: interval_of(
                [
                    gap_closed(line, base, top, level)
                    for line, base, top in zip(lines, curves[MIXED], curves[ORACLE], strict=True)
                ]
            )
            for level in setup.levels
        },
    )


def _other_costs(
    points: Sequence[Reads], curve: Curve, utility: float, test: AnswerTable, setup: Setup
) -> dict[str, float]:
    """Compute what the mixture that reaches a utility costs in the other units that are known."""
    known: dict[Unit, Array | None] = {"tokens": test.tokens, "flops": test.flops, "ms": test.milliseconds}
    crossing = curve.crossing(utility)
    if crossing is None:
        return {}
    means = {
        unit: np.array([points[point].cost(test, unit, is_nested=setup.is_nested).mean() for point in curve.points])
        for unit, values in known.items()
        if values is not None and unit != setup.unit
    }
    return {unit: crossing.of(values) for unit, values in means.items()}


# ---- kinds ----


def judge_kinds(families: Sequence[Family], sides: Sides, setup: Setup) -> list[KindRow]:
    """Compute what the router gains within each kind of question, and what it does to a kind that it does not know."""
    router = next(family for family in families if family.name == ROUTER)
    assert router.calibration is not None
    costs, utilities = _points(router.calibration, sides.calibration, setup)
    chosen = _price_at(costs.mean(axis=1), utilities.mean(axis=1), float(sides.calibration.utility[:, -1].mean()))
    held_out = None
    if sides.held_out is not None:
        policy = Policy(_prices(sides.calibration, setup.unit)[chosen])
        (held_out,) = router_reads(sides.test, sides.held_out, [policy], setup.unit, is_nested=setup.is_nested)
    rows = []
    for kind in sorted(set(sides.test.kinds)):
        learned, judged = (np.flatnonzero(np.array(table.kinds) == kind) for table in (sides.calibration, sides.test))
        if len(learned) == 0:
            continue
        part = dataclasses.replace(sides, calibration=sides.calibration.take(learned), test=sides.test.take(judged))
        of_kind = None if held_out is None else held_out.take(judged)
        rows.append(_kind_row(kind, router.take(learned, judged), part, setup, chosen, of_kind))
    return rows


def _price_at(costs: Array, utilities: Array, utility: float) -> int:
    """Find the cheapest policy (G) that reaches a utility, or the one with the largest."""
    reaches = np.flatnonzero(utilities >= utility)
    return int(reaches[np.argmin(costs[reaches])]) if len(reaches) else int(np.argmax(utilities))


def _kind_row(kind: str, router: Family, part: Sides, setup: Setup, chosen: int, held_out: Reads | None) -> KindRow:
    """Compute the line of one kind, whose questions alone are in the families and tables."""
    test = part.test
    fixed_costs, fixed_utilities = test.cost(setup.unit).mean(axis=0), test.utility.mean(axis=0)
    best = int(np.argmax(fixed_utilities))
    costs, utilities = _points(_points_in_use(router, part, setup), test, setup)
    curve = Curve.through(costs.mean(axis=1), utilities.mean(axis=1))
    return KindRow(
        kind=kind or "(none)",
        num_questions=len(test),
        best_fixed=(float(fixed_utilities[best]), float(fixed_costs[best])),
        cost_of_router=curve.cost_of(float(fixed_utilities[best])),
        at_price=_mean_point(router.test[chosen], test, setup),
        held_out=None if held_out is None else _mean_point(held_out, test, setup),
    )


def _mean_point(reads: Reads, table: AnswerTable, setup: Setup) -> tuple[float, float]:
    costs, utilities = _points([reads], table, setup)
    return float(utilities.mean()), float(costs.mean())


def report_of(sides: Sides, setup: Setup, *, second: AnswerTable | None = None) -> RoutingReport:
    """Compare routers with all that they have to beat.

    Args:
        second: see `families_of`.
    """
    families = families_of(sides, setup, second=second)
    test = sides.test
    largest = float(test.utility[:, -1].mean()), float(test.cost(setup.unit)[:, -1].mean())
    kinds = judge_kinds(families, sides, setup) if len(set(test.kinds)) > 1 else []
    return RoutingReport(setup, largest, judge(families, sides, setup), kinds)


# ---- tables ----


def _rows_table(report: RoutingReport) -> str:
    unit = report.setup.unit
    others = list(dict.fromkeys(name for row in report.rows for name in row.other_costs))
    head = [
        "policy",
        f"mean utility over log {unit}",
        f"{unit} at the largest budget's {100 * report.largest[0]:.1f} %",
        f"{unit} one point below",
        *(f"{name} there" for name in others),
        *(f"gap closed at {level:g}" for level in report.setup.levels),
    ]
    rows = [
        [
            row.name,
            f"{row.utility_over_log_cost.value:.3f}",
            _cost(row.cost_at_largest),
            _cost(row.cost_near_largest),
            *(f"{row.other_costs[name]:.3g}" if name in row.other_costs else "never" for name in others),
            *(_share(value) for value in row.gap_closed.values()),
        ]
        for row in report.rows
    ]
    return markdown_table(head, rows)


def _kinds_table(report: RoutingReport) -> str:
    unit = report.setup.unit
    head = [
        "kind",
        "questions",
        f"best fixed budget, {unit}",
        f"router, {unit} for that",
        "router at one price for all",
    ]
    has_held_out = any(row.held_out is not None for row in report.kinds)
    rows = [
        [
            row.kind,
            str(row.num_questions),
            _point(row.best_fixed),
            _number(row.cost_of_router),
            _point(row.at_price),
            *([_point(row.held_out) if row.held_out else "-"] if has_held_out else []),
        ]
        for row in report.kinds
    ]
    return markdown_table([*head, *(["the same, kind held out"] if has_held_out else [])], rows)


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "never"


def _cost(interval: Interval) -> str:
    bounds = (_number(bound) for bound in (interval.low, interval.high))
    return f"{_number(interval.value)} ({' - '.join(bounds)})"


def _share(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "-"
    return f"{100 * interval.value:.0f} % ({100 * interval.low:.0f} - {100 * interval.high:.0f})"


def _point(point: tuple[float, float]) -> str:
    return f"{100 * point[0]:.1f} % @ {point[1]:.1f}"


def _finite(value: Any) -> Any:
    """Replace numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
