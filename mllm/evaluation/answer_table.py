"""Makes tables of answers, which routers are fitted on and judged by, of evaluation lines at several fixed budgets.

Knows lines, samples and scores. Does not know models or routers.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mllm.budget import Budget
from mllm.data.manifest import Sample
from mllm.evaluation.answer_store import Line
from mllm.evaluation.metrics import vqa_accuracy, word_errors
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.router.features import MediaSet, media_set_of
from mllm.router.table import AnswerTable

QuestionKey = tuple[str, str, float | None]
"""Set, sample and noise of a question."""


def utility_of(line: Line) -> float:
    """Compute what an answer is worth, in [0, 1]: its accuracy, or 1 - min(WER, 1) of speech."""
    task = line["task"]
    if task in BENCHMARKS:
        return BENCHMARKS[task].judge(line)
    if task == "vqa":
        return vqa_accuracy(line["references"], line["hypothesis"])
    rate = word_errors(line["references"][0], line["hypothesis"]).rate
    return 1.0 - min(rate or 0.0, 1.0)


def tables_of(lines: Sequence[Line], samples: Mapping[tuple[str, str], Sample]) -> dict[MediaSet, AnswerTable]:
    """Make one table per set of media of the questions that were answered at all of its budgets.

    A question that failed at one of them is in no table.

    Args:
        lines: of an evaluation at fixed budgets.
        samples: by set and id.

    Raises:
        ValueError: lines without confidences, which an earlier release wrote, or no question about some media that was
            answered at all budgets.
    """
    answers: dict[MediaSet, dict[QuestionKey, dict[str, Line]]] = {}
    for line in lines:
        of_set = answers.setdefault(media_of(samples[line["set"], line["id"]]), {})
        of_question = of_set.setdefault((line["set"], line["id"], line["snr_db"]), {})
        if "error" not in line:
            if "min_probability" not in line:
                raise ValueError("the answers hold no min_probability; evaluate anew under another name (--name)")
            of_question[line["budget"]] = line
    return {media: _table(questions, samples) for media, questions in answers.items() if media}


def media_of(sample: Sample) -> MediaSet:
    """Return the media that a sample holds."""
    return media_set_of([part.medium for part in sample.media])


def _table(answers: Mapping[QuestionKey, Mapping[str, Line]], samples: Mapping[tuple[str, str], Sample]) -> AnswerTable:
    tokens: dict[str, list[int]] = {}
    for of_question in answers.values():
        for budget, line in of_question.items():
            tokens.setdefault(budget, []).append(sum(line["tokens"].values()))
    budgets = sorted(tokens, key=lambda budget: sum(tokens[budget]) / len(tokens[budget]))
    whole = {key: of_question for key, of_question in answers.items() if len(of_question) == len(budgets)}
    if not budgets or not whole:
        raise ValueError(
            f"none of {len(answers)} questions was answered at each of {'; '.join(budgets) or 'its budgets'}; what "
            "failed stands in the evaluation's lines"
        )
    rows = [[of_question[budget] for budget in budgets] for of_question in whole.values()]
    is_noisy = any(snr_db is not None for _, _, snr_db in whole)
    has_flops = all(line["cost"] is not None for row in rows for line in row)

    def values(one_of: str) -> np.ndarray:
        pick = {
            "utility": utility_of,
            "tokens": lambda line: sum(line["tokens"].values()),
            "confidence": lambda line: line["min_probability"],
            "flops": lambda line: line["cost"]["total"],
        }[one_of]
        return np.asarray([[pick(line) for line in row] for row in rows], float).reshape(len(rows), len(budgets))

    return AnswerTable(
        budgets=tuple(Budget.parse(budget) for budget in budgets),
        sample_keys=tuple((name, id_) for name, id_, _ in whole),
        media_keys=tuple(repr(samples[name, id_].media_key) for name, id_, _ in whole),
        tasks=tuple(row[0]["task"] for row in rows),
        kinds=tuple(_kind_of(row[0], is_noisy) for row in rows),
        utility=values("utility"),
        tokens=values("tokens"),
        confidence=values("confidence"),
        flops=values("flops") if has_flops else None,
        snrs_db=tuple(snr_db for _, _, snr_db in whole) if is_noisy else None,
    )


def _kind_of(line: Line, is_noisy: bool) -> str:
    """Return the kind of a question; where some are asked under noise, that is what telling kinds apart means."""
    noise = "" if not is_noisy else "clean" if line["snr_db"] is None else f"{line['snr_db']:g} dB"
    return f"{line['kind'] or ''} {noise}".strip()
