"""Turns answers into numbers: the metric of each task, over groups of lines.

Knows lines of `answer_store.py` and metrics. Does not know models, files or how numbers are shown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.evaluation.answer_store import Line
from mllm.evaluation.metrics import ErrorCounts, bootstrap_interval, character_errors, corpus, vqa_accuracy, word_errors
from mllm.evaluation.scorers.registry import BENCHMARKS, Benchmark


@dataclass(frozen=True)
class Score:
    """A metric over a group: its value, its bootstrap interval, and what else belongs to it.

    `value` is None where there is nothing to divide by.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    details: dict[str, Any]


@dataclass(frozen=True)
class Scorer:
    """How a task is scored, whether its kinds may be put together in one number, and whether what failed is wrong.

    Where it is not, failures are left out of the number and counted beside it.
    """

    score: Callable[[Sequence[Line], int], Score]
    has_overall: bool
    higher_is_better: bool
    counts_failures: bool = False


def score_speech(lines: Sequence[Line], seed: int) -> Score:
    """Computes corpus WER and CER, each with its errors and its interval."""
    pairs = [(line["references"][0], line["hypothesis"]) for line in lines]
    words = [word_errors(reference, hypothesis) for reference, hypothesis in pairs]
    characters = [character_errors(reference, hypothesis) for reference, hypothesis in pairs]
    total, (low, high) = corpus(words), _interval(words, seed)
    cer, (cer_low, cer_high) = corpus(characters), _interval(characters, seed)
    details = {
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "reference_words": total.reference_units,
        "cer": cer.rate,
        "cer_low": cer_low,
        "cer_high": cer_high,
        "character_substitutions": cer.substitutions,
        "character_deletions": cer.deletions,
        "character_insertions": cer.insertions,
        "reference_characters": cer.reference_units,
    }
    return Score("wer", total.rate, low, high, details)


def _interval(counts: Sequence[ErrorCounts], seed: int) -> tuple[float | None, float | None]:
    """Computes the bootstrap interval of a corpus rate, resampling utterances."""
    interval = bootstrap_interval([one.errors for one in counts], [one.reference_units for one in counts], seed=seed)
    return interval or (None, None)


def score_vqa(lines: Sequence[Line], seed: int) -> Score:
    """Computes the mean VQA accuracy; exact match where a sample has one answer."""
    values = [vqa_accuracy(line["references"], line["hypothesis"]) for line in lines]
    low, high = bootstrap_interval(values, [1] * len(values), seed=seed) or (None, None)
    return Score("accuracy", sum(values) / len(values) if values else None, low, high, {})


def _benchmark_scorer(benchmark: Benchmark) -> Scorer:
    def score(lines: Sequence[Line], seed: int) -> Score:
        total = benchmark.score(lines)
        above, below = [part[0] for part in total.parts], [part[1] for part in total.parts]
        low, high = bootstrap_interval(above, below, seed=seed) or (None, None)
        return Score(benchmark.metric, total.value, low, high, total.details)

    return Scorer(score, has_overall=True, higher_is_better=True, counts_failures=True)


_SPEECH = Scorer(score_speech, has_overall=False, higher_is_better=False)
SCORERS = {
    "asr": _SPEECH,
    "vsr": _SPEECH,
    "avsr": _SPEECH,
    "vqa": Scorer(score_vqa, has_overall=True, higher_is_better=True),
}
"""By the `task` of a sample, for those that are no benchmark."""


def scorer_of(task: str) -> Scorer:
    """Finds the scorer of a task.

    Raises:
        ValueError: a task that has none.
    """
    if task in BENCHMARKS:
        return _benchmark_scorer(BENCHMARKS[task])
    if task not in SCORERS:
        raise ValueError(f"there is no metric for task {task!r}; allowed: {', '.join([*SCORERS, *BENCHMARKS])}")
    return SCORERS[task]
