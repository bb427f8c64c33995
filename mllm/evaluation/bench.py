"""Measures what a model's budgets cost on this machine: tokens, FLOPs, cache, memory, and milliseconds by phase.

Knows a model that answers, and clocks. Does not know files, references or metrics.

Every budget answers the same requests with the same number of new tokens. Budgets are run in turn, repeat by repeat,
beginning with another one each time, so that a slow moment of the machine hits all of them.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.flops import RequestCost, row_cost
from mllm.inference.answerer import DEFAULT_PROMPTS, Answer, Answerer, Decoding
from mllm.inference.timing import PHASES, Timing
from mllm.media import Audio, Video
from mllm.processing.batch import Batch, num_prompt_tokens
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.utils.files import write_text_whole

RESULTS, PLOT = "bench.json", "bench.png"
MOST_BUDGETS = 8
Listed = TypeVar("Listed")
_IMAGE_PIXELS, _FRAME_PIXELS, _LIP_PIXELS = 512, 224, 96


@dataclass
class Measured:
    """One budget: an answer to its request, what the FLOP model says of it, and how long every repeat took.

    `cost` is None for a model without a formula, `peak_bytes` is 0 where the device does not tell.
    """

    budget: Budget
    answer: Answer
    cost: RequestCost | None
    timings: list[Timing] = field(default_factory=list)
    peak_bytes: int = 0

    def milliseconds(self, phase: str) -> list[float]:
        """Lists the milliseconds of every repeat, of one phase or of `total_ms`."""
        names = PHASES if phase == "total_ms" else (phase,)
        return [sum(getattr(timing, name) for name in names) for timing in self.timings]

    def facts(self) -> dict[str, Any]:
        """Gathers plain values: medians, the middle half, and every repeat."""
        answer = self.answer
        out: dict[str, Any] = {
            "budget": str(self.budget),
            "tokens": dict(answer.tokens),
            "is_trained": answer.is_trained,
            "prompt_tokens": answer.num_prompt_tokens,
            "new_tokens": answer.num_new_tokens,
            "peak_bytes": self.peak_bytes or None,
        }
        if self.cost is not None:
            out["flops"] = {part: getattr(self.cost, part) for part in ("encoder", "compressor", "prefill", "decode")}
            out |= {"total_flops": self.cost.total, "kv_bytes": self.cost.kv_bytes}
        for phase in (*PHASES, "total_ms"):
            values = self.milliseconds(phase)
            low, middle, high = quartiles(values)
            out[phase] = {"median": middle, "low": low, "high": high, "repeats": [round(one, 3) for one in values]}
        return out


def default_budgets(processor: ElasticProcessor, media: Sequence[str]) -> list[Budget]:
    """Lists all trained budgets of requests with these media; of more than 8, the two ends and some between."""
    return some_of(BudgetSampler(processor.space, "all").possible(media))


def some_of(budgets: Sequence[Listed]) -> list[Listed]:
    """Lists those of many budgets that are worth answering at: all of up to 8, else the two ends and some between."""
    if len(budgets) <= MOST_BUDGETS:
        return list(budgets)
    return [budgets[round(index)] for index in np.linspace(0, len(budgets) - 1, MOST_BUDGETS)]


def made_up_media(
    processor: ElasticProcessor, media: Sequence[str], seconds: float, budgets: Sequence[Budget] = ()
) -> list[LoadedMedia]:
    """Makes noise in place of files: what a model computes takes as long whatever it sees.

    Args:
        budgets: as in `ElasticProcessor.transform`.

    Raises:
        ValueError: a medium the model does not take, or audio longer than its encoder's window.
    """
    rng = np.random.default_rng(0)
    makers: dict[str, Callable[[], Any]] = {
        "image": lambda: Image.fromarray(rng.integers(0, 256, (_IMAGE_PIXELS, _IMAGE_PIXELS, 3), np.uint8)),
        "audio": lambda: Audio(rng.normal(0, 0.1, round(16_000 * seconds)).astype(np.float32), 16_000),
        "video": lambda: Video(rng.integers(0, 256, _video_shape(processor, seconds), np.uint8), 25.0),
    }
    return [processor.transform(medium, makers[medium](), budgets=budgets) for medium in media]


def _video_shape(processor: ElasticProcessor, seconds: float) -> tuple[int, ...]:
    """Returns the shape of lips in grey, or of the most frames in colour where frames are encoded like images."""
    if "video" in processor.sampling:
        return processor.sampling["video"].count, _FRAME_PIXELS, _FRAME_PIXELS, 3
    return round(25 * seconds), _LIP_PIXELS, _LIP_PIXELS


def requests(processor: ElasticProcessor, loaded: Sequence[LoadedMedia], text: str | None, batch_size: int) -> Batch:
    """Makes a batch of one request several times, none of which shares anything with another."""
    media = tuple(dict.fromkeys(item.medium for item in loaded))
    question = text or processor.prompts.get(media) or DEFAULT_PROMPTS.get(media, "what is this?")
    parts = (*(Media(item.medium, "none") for item in loaded), Text(question))  # type: ignore[arg-type]
    samples = [Sample(f"request {number}", (Message("user", parts),), task="generate") for number in range(batch_size)]
    copies = [[replace(item, values=item.values.clone()) for item in loaded] for _ in samples]
    return processor.batch(samples, copies, for_training=False)


def bench(
    model: Any,
    processor: ElasticProcessor,
    batches: Mapping[Budget, Batch],
    *,
    decoding: Decoding,
    repeats: int,
    warmup: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Measures every budget.

    Args:
        batches: the requests by budget: the same ones, but for images that a budget lets its host see smaller.
        decoding: `max_new_tokens` are decoded, not fewer.
        repeats: measurements of every budget.
        warmup: rounds before those, which do not count.

    Raises:
        ValueError: a budget that the requests cannot meet.
    """
    # Every budget must decode equally long. `generate` asks the model's config where it is told of no end.
    answerer = Answerer(model, processor, replace(decoding, ignores_end=True))
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    measured: dict[Budget, Measured] = {}
    budgets = list(batches)
    try:
        for number in range(warmup + repeats):
            turned = [*budgets[number % len(budgets) :], *budgets[: number % len(budgets)]]
            for num_done, budget in enumerate(turned, start=1):
                batch = batches[budget]
                answer, peak_bytes = _run(answerer, batch, budget)
                if number >= warmup:
                    if budget not in measured:
                        cost = budget_cost(
                            model,
                            processor,
                            batch,
                            budget,
                            num_new_tokens=answer.num_new_tokens,
                            num_beams=decoding.num_beams,
                        )
                        measured[budget] = Measured(budget, answer, cost)
                    assert answer.timing is not None
                    measured[budget].timings.append(answer.timing)
                    measured[budget].peak_bytes = max(measured[budget].peak_bytes, peak_bytes)
                progress(number * len(budgets) + num_done, (warmup + repeats) * len(budgets))
    finally:
        model.generation_config.eos_token_id = before
    return [measured[budget] for budget in budgets]


def _run(answerer: Answerer, batch: Batch, budget: Budget) -> tuple[Answer, int]:
    """Answers once: returns the first answer, with the timing of all, and the most memory that the device held."""
    device = answerer.model.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    answers = answerer.answer_batch(batch, [[budget] * len(batch.rows)], timed=True)[0]
    short = [answer.num_new_tokens for answer in answers if answer.num_new_tokens != answerer.decoding.max_new_tokens]
    assert not short or answerer.decoding.num_beams > 1, short
    return answers[0], torch.cuda.max_memory_allocated(device) if on_gpu else 0


def budget_cost(
    model: Any, processor: ElasticProcessor, batch: Batch, budget: Budget, *, num_new_tokens: int, num_beams: int = 1
) -> RequestCost | None:
    """Computes what the first row of a batch costs at a budget, without running it; None for a model without a formula.

    Raises:
        ValueError: a budget that the row cannot meet.
    """
    row = batch.rows[0]
    counts = row.token_counts(budget, processor.space)
    pixels = tuple(batch.values["video_values"].shape[-2:]) if "video_values" in batch.values else (0, 0)
    return row_cost(
        model,
        row,
        counts,
        frame_pixels=[pixels] * len(row.spans),
        num_prompt_tokens=num_prompt_tokens(row, counts),
        num_new_tokens=num_new_tokens,
        num_beams=num_beams,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Computes the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def write(results: Sequence[Measured], facts: Mapping[str, Any], folder: Path) -> None:
    """Writes `bench.json` and `bench.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"facts": dict(facts), "budgets": [one.facts() for one in results]}
    write_text_whole(folder / RESULTS, json.dumps(values, indent=1) + "\n")
    plot(results, folder / PLOT)


def plot(results: Sequence[Measured], path: Path) -> None:
    """Plots milliseconds by phase of each budget, and the gain over the first budget, measured and by FLOPs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.45 * len(results) + 2), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    times, gains = figure.subplots(1, 2, sharey=True)
    names, heights = [str(one.budget) or "text" for one in results], np.arange(len(results))
    left = np.zeros(len(results))
    for phase in PHASES:
        medians = np.array([statistics.median(one.milliseconds(phase)) for one in results])
        times.barh(heights, medians, left=left, label=phase.removesuffix("_ms"))
        left += medians
    times.set_yticks(heights, names)
    times.invert_yaxis()
    times.set_xlabel("milliseconds (medians)")
    times.legend(frameon=False)
    totals = [statistics.median(one.milliseconds("total_ms")) for one in results]
    gains.plot([totals[0] / one for one in totals], heights, "o-", label="measured")
    if all(one.cost is not None for one in results):
        flops = [one.cost.total for one in results if one.cost is not None]
        gains.plot([flops[0] / one for one in flops], heights, "s--", label="FLOP model")
    gains.set_xlabel("times the speed of the first budget")
    gains.legend(frameon=False)
    gains.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
