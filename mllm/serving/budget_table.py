"""Measures what each trained budget of a model costs on this machine, as a server tells it.

Knows a model and the measurement of budgets. Does not know HTTP.
"""

from dataclasses import dataclass
from typing import Any

from mllm.budget import Budget
from mllm.evaluation.bench import bench, budget_cost, made_up_media, requests, some_of
from mllm.inference.answerer import Decoding
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor
from mllm.serving.budgets import BudgetPolicy


@dataclass(frozen=True)
class Measurement:
    """Says how budgets are measured.

    Args:
        seconds: length of the audio or video that is made up.
        new_tokens: that are decoded each time.
        repeats: of every budget; 0 measures none, and no time is shown.
    """

    seconds: float = 4.0
    new_tokens: int = 8
    repeats: int = 3


def budget_table(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, policy: BudgetPolicy, how: Measurement
) -> list[dict[str, Any]]:
    """List the trained budgets of every medium, most tokens first: tokens, FLOPs, cache, milliseconds of a request.

    Of more than 8 budgets of a medium some are measured; the others have null for their milliseconds. Requests are
    about made-up media.
    """
    return [row for medium in processor.space.media for row in _rows(model, processor, policy, how, medium)]


def _rows(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    policy: BudgetPolicy,
    how: Measurement,
    medium: str,
) -> list[dict[str, Any]]:
    budgets = [Budget({medium: amount}) for amount in policy.within(medium)]
    window = processor.window_seconds if medium == "audio" else None
    seconds = how.seconds if window is None else min(how.seconds, window)
    batch = requests(processor, made_up_media(processor, [medium], seconds), None, 1)
    measured = {}
    if how.repeats:
        decoding = Decoding(max_new_tokens=how.new_tokens)
        batches = dict.fromkeys(some_of(budgets), batch)
        results = bench(model, processor, batches, decoding=decoding, repeats=how.repeats, warmup=1)
        measured = {result.budget: result.facts() for result in results}
    rows = []
    for budget in budgets:
        facts = measured.get(budget)
        cost = budget_cost(model, processor, batch, budget, num_new_tokens=how.new_tokens)
        rows.append(
            {
                "budget": str(budget),
                "type": medium,
                "tokens": batch.rows[0].token_counts(budget, processor.space)[0].tokens,
                "flops": None if cost is None else cost.total,
                "kv_bytes": None if cost is None else cost.kv_bytes,
                "milliseconds": None if facts is None else round(facts["total_ms"]["median"], 3),
                "milliseconds_before_first_token": None
                if facts is None
                else round(facts["encoder_ms"]["median"] + facts["prefill_ms"]["median"], 3),
                "seconds_of_media": None if medium in ("image", *processor.sampling) else seconds,
            }
        )
    return rows
