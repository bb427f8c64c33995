"""An evaluation at `auto` and at fixed budgets compares the two, as a report on the same answers does."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from answer_tables import answers

from mllm.budget import Budget
from mllm.config.long_audio import LongAudio
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.answer_table import tables_of
from mllm.evaluation.router_fitting import Answers, with_features
from mllm.evaluation.routing_families import router_reads
from mllm.evaluation.routing_of_evaluation import THRESHOLD, compare_evaluated, report_fitted
from mllm.evaluation.routing_report import MIXED, ORACLE, ROUTER, RoutingReport, Setup, predict_sides, report_of
from mllm.inference.answerer import Answerer
from mllm.router.policy import Policy
from mllm.router.router import MediaRouter, Router, fit_media_router

SETUP = Setup(is_nested=True, num_samples=20)
TOKENS = {"image=1": 1, "image=4": 4, "image=16": 16, "image=64": 64, "auto": 4}


def test_it_says_what_a_report_says_of_the_same_router() -> None:
    fitted, test = answers(60, seed=0), answers(60, seed=1)
    router = fit_media_router(fitted, is_nested=True)
    report = report_fitted(test, router, SETUP)
    rows = {row.name: row for row in report.rows}
    expected = {row.name: row for row in report_of(predict_sides(fitted, test), SETUP).rows}
    areas = {name: row.utility_over_log_cost.value for name, row in rows.items()}
    for name in (MIXED, ORACLE):
        assert areas[name] == expected[name].utility_over_log_cost.value
    assert areas[MIXED] < areas[ROUTER] < areas[ORACLE]
    assert areas[THRESHOLD] < areas[ROUTER]
    assert areas[ROUTER] == pytest.approx(expected[ROUTER].utility_over_log_cost.value, abs=0.01)
    # Every point of the router is what one of its prices gives on the test, or the largest budget.
    predictions = router.heads.predict(test.features, test.confidence)
    policies = [Policy(point.price) for point in router.points if point.max_growths == 2]
    means = [
        (one.cost(test, "tokens", is_nested=True).mean(), one.utility(test).mean())
        for one in router_reads(test, predictions, policies, "tokens", is_nested=True)
    ]
    for point in rows[ROUTER].points:
        assert any(point == pytest.approx(mean) for mean in [*means, report.largest[::-1]])


def router_of(budgets: Sequence[str]) -> MediaRouter:
    """Fit a router that looks at the question alone, on media that nobody else has."""
    table = answers(30, seed=0)
    question = np.random.default_rng(0).normal(size=(len(table), tiny.llm_config().hidden_size))
    described = dataclasses.replace(table, budgets=tuple(map(Budget.parse, budgets)), features={"question": question})
    return fit_media_router(described, is_nested=False)


def lines_of(sample: Sample) -> list[dict[str, Any]]:
    return [
        {
            **{"set": "test", "id": sample.id, "snr_db": None, "budget": budget, "task": "vqa", "kind": None},
            **{"references": ["red"], "hypothesis": "blue" if tokens == 1 else "red", "min_probability": 0.5},
            **{"tokens": {"image": tokens}, "cost": None},
        }
        for budget, tokens in TOKENS.items()
    ]


def test_it_needs_the_fixed_budgets_and_media_that_the_router_has_not_seen(tmp_path: Path) -> None:
    config = tiny.settings(("image",))
    samples = {}
    for number in range(2):
        parts = (Media("image", tiny.write_media(tmp_path, seed=number)["image"]), Text("what colour is it?"))
        messages = (Message("user", parts), Message("assistant", (Text("red"),)))
        samples["test", str(number)] = dataclasses.replace(Sample(str(number), messages, "vqa"), root=tmp_path)
    model, processor = tiny.model(config), tiny.processor(config)
    router = router_of([budget for budget in TOKENS if budget != "auto"])
    answerer = Answerer(model, processor, router=Router({("image",): router}, {}))
    lines = [line for sample in samples.values() for line in lines_of(sample)]
    report = compare_evaluated(answerer, lines, samples, None)["image",]
    assert isinstance(report, RoutingReport)
    assert report.largest == (1.0, 64.0)
    assert ROUTER in report.to_markdown()
    assert compare_evaluated(answerer, [line for line in lines if line["budget"] != "auto"], samples, None) == {}
    table = tables_of([line for line in lines if line["budget"] != "auto"], samples)["image",]
    digests = with_features(table, Answers(lines, samples), model, processor).media_digests()
    knows_one = dataclasses.replace(router, media_digests=tuple(digests[:1]))
    seen = Answerer(model, processor, router=Router({("image",): knows_one}, {}))
    assert compare_evaluated(seen, lines, samples, None)["image",] == (
        "the router was fitted on 1 of these images or clips, so it would look too good"
    )
    # A router of other media answered nothing here, and every line at `auto` is a failure.
    failed = [line | {"error": {}} if line["budget"] == "auto" else line for line in lines]
    other = Answerer(model, processor, router=Router({("audio",): router}, {}))
    assert compare_evaluated(other, failed, samples, None) == {}
    missing = compare_evaluated(answerer, [line for line in lines if line["budget"] != "image=4"], samples, None)
    assert missing["image",] == "for a comparison with fixed budgets, evaluate at image=1;image=4;image=16;image=64 too"


def test_audio_in_windows_has_no_budget_that_could_be_compared(tmp_path: Path) -> None:
    config = tiny.settings(("audio",))
    model, processor = tiny.model(config), tiny.processor(config)
    budgets = ("audio=/32", "audio=/16", "audio=/8", "audio=/4")
    lines, samples = [], {}
    for number, seconds in enumerate((1.0, 3.0)):
        path = tiny.write_media(tmp_path, seconds=seconds, seed=number)["audio"]
        parts = (Media("audio", path), Text("transcribe speech to text."))
        messages = (Message("user", parts), Message("assistant", (Text("red"),)))
        sample = dataclasses.replace(Sample(str(number), messages, "asr"), root=tmp_path)
        samples["test", sample.id] = sample
        for line, budget in zip(lines_of(sample), (*budgets, "auto"), strict=True):
            lines.append({**line, "task": "asr", "budget": budget, "seconds": seconds})
    router = Router({("audio",): router_of(budgets)}, {})
    chunks = Answerer(model, processor, router=router, long_audio=LongAudio(mode="chunk"))
    assert compare_evaluated(chunks, lines, samples, None)["audio",] == (
        "1 of the samples are answered in windows, and auto chooses for each window; for a comparison with fixed "
        "budgets, evaluate without long_audio"
    )
    short = [line for line in lines if line["id"] == "0"]
    assert isinstance(compare_evaluated(chunks, short, samples, None)["audio",], RoutingReport)
