"""What each trained budget of a model costs on this machine, as a server tells it.

Knows a model and the measurement of budgets. Does not know HTTP.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm.budget import Budget
from mllm.evaluation.bench import MOST_BUDGETS, bench, made_up_media, requests
from mllm.inference.answerer import Decoding
from mllm.media import Video
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.processor import ElasticProcessor
from mllm.serving.budgets import BudgetPolicy

_FRAME_PIXELS = 224


@dataclass(frozen=True)
class Measurement:
    """How budgets are measured.

    Args:
        seconds: length of the sound or video that is made up.
        new_tokens: that are decoded each time.
        repeats: of every budget; 0 measures nothing, and no time is told.
    """

    seconds: float = 4.0
    new_tokens: int = 8
    repeats: int = 3


def budget_table(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, policy: BudgetPolicy, how: Measurement
) -> list[dict[str, Any]]:
    """The trained budgets of every medium, most tokens first: tokens, FLOPs, cache and milliseconds of one request.

    Of more than 8 budgets of a medium some are measured; the others have null there. Requests are about made-up media.
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
    loaded = _made_up(processor, medium, seconds)
    batch = requests(processor, loaded, None, 1)
    places = {round(place) for place in np.linspace(0, len(budgets) - 1, min(len(budgets), MOST_BUDGETS))}
    measured = {}
    if how.repeats:
        chosen = [budgets[place] for place in sorted(places)]
        decoding = Decoding(max_new_tokens=how.new_tokens)
        found = bench(model, processor, batch, chosen, decoding=decoding, repeats=how.repeats, warmup=1)
        measured = {one.budget: one.facts() for one in found}
    rows = []
    for budget in budgets:
        facts = measured.get(budget)
        cost = batch.rows[0].token_counts(budget, processor.space)[0]
        rows.append(
            {
                "budget": str(budget),
                "type": medium,
                "tokens": cost.tokens,
                "flops": None if facts is None else facts.get("total_flops"),
                "kv_bytes": None if facts is None else facts.get("kv_bytes"),
                "milliseconds": None if facts is None else round(facts["total_ms"]["median"], 3),
                "milliseconds_before_first_token": None
                if facts is None
                else round(facts["encoder_ms"]["median"] + facts["prefill_ms"]["median"], 3),
                "seconds_of_media": None if medium in ("image", *processor.sampling) else seconds,
            }
        )
    return rows


def _made_up(processor: ElasticProcessor, medium: str, seconds: float) -> list[LoadedMedia]:
    """One medium made up; of a video whose frames are images as many as are taken."""
    if medium in processor.sampling:
        shape = (processor.sampling[medium].count, _FRAME_PIXELS, _FRAME_PIXELS, 3)
        frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        return [processor.transform(medium, Video(frames, 1.0))]
    return made_up_media(processor, [medium], seconds)
