"""Sets answers at `auto` beside what they have to beat, from the same evaluation's answers at fixed budgets.

Knows evaluation lines, a fitted router and the comparison of `routing_report.py`. Does not fit anything: which prices
are worth mixing is what the router noted of its calibration. Baselines that need answers to choose on are chosen on the
test itself here, which flatters them; `mllm router report` chooses them on other answers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mllm.budget import Budget
from mllm.data.manifest import Sample
from mllm.evaluation.answer_store import Line
from mllm.evaluation.answer_table import media_of, tables_of
from mllm.evaluation.noise import EvaluationNoise
from mllm.evaluation.router_fitting import Answers, SampleKey, with_features
from mllm.evaluation.routing_families import fixed_reads, kind_reads, oracle_reads, router_reads, threshold_reads
from mllm.evaluation.routing_report import (
    BEST_CONSTANT,
    MIXED,
    NO_GROWING,
    ORACLE,
    ROUTER,
    Family,
    RoutingReport,
    Setup,
    Sides,
    judge,
    points_in_use,
    thresholds_of,
)
from mllm.inference.answerer import Answerer
from mllm.inference.growth import grows
from mllm.inference.long_audio import lengths_of
from mllm.router.features import MediaSet
from mllm.router.policy import MAX_GROWTHS, Policy, price_grid
from mllm.router.router import MediaRouter
from mllm.router.table import AnswerTable

THRESHOLD = "one confidence threshold, chosen on the test"
NUM_SAMPLES = 300
"""Bootstrap samples of the intervals; an evaluation should not wait for more."""


def compare_evaluated(
    answerer: Answerer,
    lines: Sequence[Line],
    samples: Mapping[SampleKey, Sample],
    noise: EvaluationNoise | None,
    *,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[MediaSet, RoutingReport | str]:
    """Compare the router of an evaluation with fixed budgets, for every set of media that was answered at `auto`.

    Args:
        answerer: that answered, with its router.
        lines: of the evaluation, at `auto` and at fixed budgets.
        samples: by set and id.
        noise: that was mixed in.
        folder: of the model.
        seed: of the bootstrap.

    Returns:
        By media the comparison, or what has to be evaluated for one.

    Raises:
        MediaError: a file that cannot be read any more.
    """
    compared: dict[MediaSet, RoutingReport | str] = {}
    for media, of_media in _by_media([line for line in lines if "error" not in line], samples).items():
        if answerer.router is None or not media or not any(_is_auto(line) for line in of_media):
            continue
        fitted = answerer.router.of(media)
        budgets = [str(budget) for budget in fitted.budgets]
        fixed = [line for line in of_media if line["budget"] in budgets]
        answered: dict[tuple, set[str]] = {}
        for line in fixed:
            answered.setdefault((line["set"], line["id"], line["snr_db"]), set()).add(line["budget"])
        if set(budgets) not in answered.values():
            compared[media] = f"for a comparison with fixed budgets, evaluate at {';'.join(budgets)} too"
            continue
        if in_windows := _in_windows(answerer, fixed):
            compared[media] = (
                f"{len(in_windows)} of the samples are answered in windows, and auto chooses for each window; for a "
                "comparison with fixed budgets, evaluate without long_audio"
            )
            continue
        table = tables_of(fixed, samples)[media].at(fitted.budgets)
        answers = Answers(fixed, dict(samples), noise)
        described = with_features(table, answers, answerer.model, answerer.processor, folder=folder)
        if seen := set(described.media_digests()) & set(fitted.media_digests):
            compared[media] = (
                f"the router was fitted on {len(seen)} of these images or clips, so it would look too good"
            )
            continue
        is_nested = media == ("image",) and grows(answerer.model, answerer.processor, answerer.decoding)
        setup = Setup(is_nested=is_nested, num_samples=NUM_SAMPLES, seed=seed)
        compared[media] = report_fitted(described, fitted, setup)
    return compared


def report_fitted(test: AnswerTable, fitted: MediaRouter, setup: Setup) -> RoutingReport:
    """Compare a router that was fitted elsewhere with what it has to beat.

    Args:
        test: answers at its budgets, cheapest first, with features, about media it has not seen.
    """
    predictions = fitted.heads.predict(test.features, test.confidence)
    prices = price_grid(float(test.cost(setup.unit)[:, -1].mean())).tolist()
    families = [Family(MIXED, fixed_reads(test)), Family(THRESHOLD, threshold_reads(test, thresholds_of(test)))]
    for name, max_growths in ((f"router, {NO_GROWING}", 0), (ROUTER, MAX_GROWTHS)):
        points = [point for point in fitted.points if point.max_growths == max_growths]
        policies = [Policy(point.price, max_growths) for point in points]
        reads = router_reads(test, predictions, policies, setup.unit, is_nested=setup.is_nested)
        # The largest budget is the last point: it has all of its own quality.
        costs = np.array([*(point.mean_tokens for point in points), test.tokens[:, -1].mean()])
        used = points_in_use(costs, np.array([*(point.quality for point in points), 1.0]))
        families.append(Family(name, reads, used=used))
    families.append(Family(BEST_CONSTANT, kind_reads(test, test, prices, setup.unit)))
    families.append(Family(ORACLE, oracle_reads(test, prices, setup.unit)))
    largest = float(test.utility[:, -1].mean()), float(test.cost(setup.unit)[:, -1].mean())
    return RoutingReport(setup, largest, judge(families, Sides(test, test, {}), setup))


def _by_media(lines: Sequence[Line], samples: Mapping[SampleKey, Sample]) -> dict[MediaSet, list[Line]]:
    grouped: dict[MediaSet, list[Line]] = {}
    for line in lines:
        grouped.setdefault(media_of(samples[line["set"], line["id"]]), []).append(line)
    return grouped


def _in_windows(answerer: Answerer, lines: Sequence[Line]) -> set[SampleKey]:
    """List the samples whose audio is longer than what its encoder hears at once."""
    if answerer.long_audio.mode == "refuse":
        return set()
    window_seconds, _ = lengths_of(answerer.long_audio, answerer.processor)
    return {(line["set"], line["id"]) for line in lines if (line["seconds"] or 0.0) > window_seconds}


def _is_auto(line: Line) -> bool:
    return Budget.parse(line["budget"]).auto is not None
