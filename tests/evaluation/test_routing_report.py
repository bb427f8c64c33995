"""The comparison of routers cannot flatter: what must be above is above, and whoever knows no question is not."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answer_tables import BUDGETS, CHANCES, answers

from mllm.evaluation.routing_curves import (
    Curve,
    UnitSums,
    bootstrap_weights,
    gap_closed,
    hull_of,
    interval_of,
)
from mllm.evaluation.routing_families import (
    fixed_reads,
    kind_reads,
    oracle_reads,
    router_reads,
    threshold_reads,
)
from mllm.evaluation.routing_plot import plot_rows
from mllm.evaluation.routing_report import (
    CONTROL,
    MIXED,
    ORACLE,
    ROUTER,
    Family,
    RoutingReport,
    Setup,
    Sides,
    judge,
    points_in_use,
    predict_sides,
    report_of,
)
from mllm.router.policy import Policy, Predictions
from mllm.router.table import AnswerTable

SETUP = Setup(is_nested=True, num_samples=30)


@pytest.fixture(scope="module")
def sides() -> Sides:
    """Routers fitted on 40 images, to be judged on 100 others."""
    return predict_sides(answers(40, seed=0), answers(100, seed=1))


@pytest.fixture(scope="module")
def report(sides: Sides) -> RoutingReport:
    return report_of(sides, SETUP, second=answers(100, seed=2))


# ---- curves ----


def test_a_hull_is_what_the_best_mixture_of_two_policies_gives_and_above_every_policy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs, utilities = rng.integers(1, 20, 12).astype(float), rng.random(12)
        hull = hull_of(costs, utilities)
        curve = Curve(costs[hull], utilities[hull], np.array(hull))
        assert (np.diff(curve.costs) > 0).all()
        assert (np.diff(curve.utilities) > 0).all()
        assert (np.diff(np.diff(curve.utilities) / np.diff(curve.costs)) < 0).all()
        for cost in np.linspace(costs.min(), costs.max(), 7):
            mixtures = [
                utilities[a] + (utilities[b] - utilities[a]) * (cost - costs[a]) / (costs[b] - costs[a])
                for a, b in itertools.product(range(12), repeat=2)
                if costs[a] <= cost <= costs[b] and costs[a] < costs[b]
            ]
            best = max([*mixtures, *utilities[costs <= cost]])
            assert curve.utility_at(cost) == pytest.approx(best)


def test_policies_between_the_best_one_and_the_largest_budget_stay_in_use() -> None:
    # The fourth policy looked best on the calibration; the fifth is the one to take where that was luck.
    costs, utilities = (
        np.array([1.0, 4.0, 6.0, 10.0, 20.0, 80.0, 64.0]),
        np.array([0.5, 0.8, 0.7, 0.96, 0.95, 0.99, 0.9]),
    )
    assert points_in_use(costs, utilities) == [0, 1, 3, 4]
    assert hull_of(costs[:-2], utilities[:-2]) == [0, 1, 3]
    assert points_in_use(np.array([64.0, 64.0]), np.array([0.5, 0.9])) == []
    rng = np.random.default_rng(1)
    for _ in range(20):
        costs, utilities = np.append(rng.random(9), 1.0), rng.random(10)
        used = points_in_use(costs, utilities)
        best = hull_of(costs, utilities)
        assert [point for point in best if point < 9] == used[: len([point for point in best if point < 9])]


def test_a_cost_read_off_a_curve_gives_the_utility_back() -> None:
    curve = Curve.through(np.array([4.0, 1.0, 16.0, 8.0]), np.array([0.6, 0.5, 0.9, 0.55]))
    assert curve.points.tolist() == [1, 0, 2]  # the fourth costs more than the first and brings less
    for utility in (0.5, 0.57, 0.6, 0.8, 0.9):
        assert curve.utility_at(curve.cost_of(utility)) == pytest.approx(utility)
    assert curve.cost_of(0.3) == 1.0
    assert curve.cost_of(0.95) == math.inf
    crossing = curve.crossing(0.75)
    assert crossing is not None
    assert crossing.of(np.array([10.0, 20.0, 40.0])) == pytest.approx(30.0)
    flat = Curve.through(np.array([1.0, 64.0]), np.array([0.5, 0.5]))
    assert flat.mean_over_log_cost(1, 64) == pytest.approx(0.5)
    assert gap_closed(curve, flat, curve, 4.0) == pytest.approx(1.0)
    assert math.isnan(gap_closed(curve, flat, flat, 4.0))


def test_a_bootstrap_counts_whole_images_and_begins_with_the_sample_itself() -> None:
    rng = np.random.default_rng(0)
    units = [np.array([0, 3, 4]), np.array([1]), np.array([2, 5])]
    costs, utilities = rng.random((4, 6)), rng.random((4, 6))
    weights = bootstrap_weights(3, 5, seed=1)
    mean_costs, mean_utilities = UnitSums.of(costs, utilities, units).means(weights)
    np.testing.assert_allclose(mean_costs[0], costs.mean(axis=1))
    for of_draw, cost, utility in zip(weights, mean_costs, mean_utilities, strict=True):
        assert of_draw.sum() == 3
        rows = np.concatenate([rows for rows, count in zip(units, of_draw, strict=True) for _ in range(int(count))])
        np.testing.assert_allclose(cost, costs[:, rows].mean(axis=1))
        np.testing.assert_allclose(utility, utilities[:, rows].mean(axis=1))


def test_an_interval_may_end_in_infinity_and_holds_the_middle_of_the_samples() -> None:
    interval = interval_of([5.0, *range(100)])
    assert (interval.value, interval.low, interval.high) == (5.0, 2.0, 97.0)
    assert interval_of([5.0, *([4.0] * 50), *([math.inf] * 50)]).high == math.inf


# ---- families ----


@pytest.mark.parametrize("is_nested", [True, False])
def test_what_a_policy_reads_is_billed_as_the_policy_says(is_nested: bool) -> None:
    table, rng = answers(10, seed=0), np.random.default_rng(0)
    n = len(table)
    predictions = Predictions(rng.random((n, 4)), rng.random((n, 4, 4)))
    policies = [Policy(price) for price in (0.0, 0.002, 0.01)]
    for policy, reads in zip(
        policies, router_reads(table, predictions, policies, "tokens", is_nested=is_nested), strict=True
    ):
        routes = policy.route(predictions, table.tokens, is_nested=is_nested)
        np.testing.assert_array_equal(reads.chosen, routes.chosen)
        np.testing.assert_allclose(reads.cost(table, "tokens", is_nested=is_nested), routes.spent)
        np.testing.assert_array_equal(reads.is_read.sum(axis=1), routes.num_growths + 1)


def test_a_threshold_climbs_from_budget_to_budget() -> None:
    table = answers(10, seed=0)
    (reads,) = threshold_reads(table, [0.8])
    for number, row in enumerate(table.confidence.tolist()):
        expected = next((budget for budget, one in enumerate(row) if one >= 0.8), 3)
        assert reads.chosen[number] == expected
        assert reads.is_read[number].tolist() == [budget <= expected for budget in range(4)]
    spent = reads.cost(table, "tokens", is_nested=False)
    assert spent.tolist() == [sum(BUDGETS[: chosen + 1]) for chosen in reads.chosen]


def test_constants_are_the_best_of_their_kind_and_oracles_the_best_of_each_question() -> None:
    table = answers(50, seed=0)
    kinds = np.array(table.kinds)
    for price in (0.0, 0.001, 0.02):
        (constant,) = kind_reads(table, table, [price], "tokens")
        (oracle,) = oracle_reads(table, [price], "tokens")
        gains = table.utility - price * table.tokens
        for kind in CHANCES:
            (budget,) = set(constant.chosen[kinds == kind].tolist())
            assert gains[kinds == kind].mean(axis=0)[budget] == gains[kinds == kind].mean(axis=0).max()
        rows = np.arange(len(table))
        np.testing.assert_array_equal(gains[rows, oracle.chosen], gains.max(axis=1))
    others = answers(5, seed=1).take(np.arange(1))
    assert kind_reads(table.take(np.flatnonzero(kinds == "count")), others, [0.0], "tokens")[0].chosen.tolist() == [3]


# ---- the report ----


def row_of(report: RoutingReport, name: str) -> float:
    (row,) = [row for row in report.rows if row.name == name]
    return row.utility_over_log_cost.value


def test_nothing_is_above_the_oracle_and_every_fixed_budget_is_on_or_below_the_mixtures(report: RoutingReport) -> None:
    assert max(row_of(report, row.name) for row in report.rows) == row_of(report, ORACLE)
    (mixed,) = [row for row in report.rows if row.name == MIXED]
    costs, utilities = (np.array(values) for values in zip(*mixed.points, strict=True))
    test = answers(100, seed=1)
    for reads in fixed_reads(test):
        cost, utility = reads.cost(test, "tokens", is_nested=True).mean(), reads.utility(test).mean()
        assert np.interp(cost, costs, utilities) >= utility - 1e-12
    assert set(mixed.gap_closed) == set(SETUP.levels)
    assert all(interval.value == 0 for interval in mixed.gap_closed.values())


def test_a_router_beats_the_mixtures_and_one_with_shuffled_questions_does_not(report: RoutingReport) -> None:
    (shuffled,) = [row for row in report.rows if row.name == CONTROL]
    (mixed,) = [row for row in report.rows if row.name == MIXED]
    assert row_of(report, ROUTER) > row_of(report, MIXED) + 0.02
    assert row_of(report, "question only, no growing") > row_of(report, MIXED) + 0.02
    noise = mixed.utility_over_log_cost.high - mixed.utility_over_log_cost.low
    assert shuffled.utility_over_log_cost.value <= mixed.utility_over_log_cost.value + noise


def test_a_ceiling_without_luck_is_below_the_oracle(report: RoutingReport) -> None:
    """Of four guesses at a count one is often right; whoever chooses by other answers does not profit from that."""
    assert row_of(report, "oracle that chooses by independent answers") < row_of(report, ORACLE) - 0.02
    assert row_of(report, "best constant per kind, chosen on the test") < row_of(report, ORACLE) - 0.02


def test_intervals_hold_their_values_and_costs_come_in_all_known_units(report: RoutingReport) -> None:
    (router,) = [row for row in report.rows if row.name == ROUTER]
    for interval in (router.utility_over_log_cost, *router.gap_closed.values()):
        assert interval.low <= interval.value <= interval.high
    assert router.cost_near_largest.value <= router.cost_at_largest.value
    assert set(router.other_costs) == {"flops"}
    assert router.other_costs["flops"] >= 101.0


def test_kinds_show_what_is_known_beyond_telling_them_apart_and_what_a_shift_does(report: RoutingReport) -> None:
    by_kind = {row.kind: row for row in report.kinds}
    assert set(by_kind) == set(CHANCES)
    assert all(row.num_questions == 100 for row in report.kinds)
    letter = by_kind["letter"]
    assert letter.best_fixed[1] == 64.0
    assert letter.held_out is not None
    # A router that has never seen the hard kind reads too few tokens for it.
    assert letter.held_out[0] < letter.at_price[0] - 0.05
    assert letter.held_out[1] < letter.at_price[1]


def test_a_kind_that_was_held_out_is_judged_at_the_price_for_all(sides: Sides) -> None:
    """Predictions that are the router's own choose as the router does, also where a kind's answers cost more."""

    def dearer_letters(table: AnswerTable) -> AnswerTable:
        is_letter = np.array(table.kinds) == "letter"
        return replace(table, tokens=np.where(is_letter[:, None], 4 * table.tokens, table.tokens))

    both = replace(
        sides,
        calibration=dearer_letters(sides.calibration),
        test=dearer_letters(sides.test),
        held_out=sides.predictions[ROUTER][1],
    )
    rows = report_of(both, SETUP).kinds
    assert len(rows) == len(CHANCES)
    for row in rows:
        assert row.held_out == row.at_price


def test_prices_are_chosen_on_the_calibration_alone(sides: Sides) -> None:
    """A family whose calibration says that one policy is best shows that policy on the test, whatever would be best."""
    calibration, test = sides.calibration, sides.test
    only_cheapest = np.zeros_like(calibration.utility)
    only_cheapest[:, 0] = 1.0
    families = [
        Family("chosen", fixed_reads(test), fixed_reads(calibration)),
        Family(MIXED, fixed_reads(test)),
        Family(ORACLE, oracle_reads(test, [0.0, 0.01], "tokens")),
    ]
    chosen, mixed, _ = judge(families, replace(sides, calibration=replace(calibration, utility=only_cheapest)), SETUP)
    # The cheapest, and what can always be had: the largest.
    assert chosen.points == [pytest.approx((BUDGETS[end], test.utility[:, end].mean())) for end in (0, -1)]
    assert len(mixed.points) > 2


def test_a_report_is_written_as_table_data_and_plot(report: RoutingReport, tmp_path: Path) -> None:
    report.write(tmp_path)
    plot_rows(report.rows, tmp_path / "routing.png")
    table = (tmp_path / "routing.md").read_text()
    assert all(row.name in table for row in report.rows)
    assert "the same, kind held out" in table
    data = json.loads((tmp_path / "routing.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert [row["name"] for row in data["rows"]] == [row.name for row in report.rows]
    assert (tmp_path / "routing.png").stat().st_size > 10_000


def test_features_without_a_question_are_refused() -> None:
    table = answers(40, seed=0)
    nameless = replace(table, features={"media": table.features["media"]})
    with pytest.raises(ValueError, match="holds no features of the question; there are media"):
        predict_sides(nameless, nameless)
