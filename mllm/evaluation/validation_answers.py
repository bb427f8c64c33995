"""Answers some of a run's validation samples while it trains, and scores the answers as `mllm evaluate` does.

Knows a run config, samples, an answerer and scorers. Does not know the trainer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mllm.budget import Budget
from mllm.config.run import RunConfig
from mllm.data.manifest import Sample
from mllm.data.readers import read_data
from mllm.evaluation.answer_store import Line
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.evaluation.scoring import SCORERS, scorer_of
from mllm.evaluation.work_list import references_of
from mllm.inference.answerer import Answerer, Decoding
from mllm.media import MediaLoader
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor
from mllm.utils.distributed import gather_json
from mllm.utils.files import write_text_whole
from mllm.utils.run_paths import VALIDATION_ANSWERS

BATCH_SIZE = 8


def validation_answers(config: RunConfig) -> "ValidationAnswers | None":
    """Make what answers samples at each validation of a run; None where `train.answered_samples` is 0.

    Raises:
        ValueError: no sample of data.validation has a task with a metric; those that have one are named.
        OSError: a manifest cannot be read.
    """
    wanted = config.train.answered_samples
    if not wanted:
        return None
    data = config.data
    samples = [sample for path in data.validation for sample in read_data(path, data.root, data.reader)]
    scored = [sample for sample in samples if sample.task in SCORERS or sample.task in BENCHMARKS]
    if not scored:
        tasks = ", ".join(sorted({sample.task for sample in samples}))
        raise ValueError(
            f"train.answered_samples is {wanted}, but no sample of data.validation has a task with a metric: they have "
            f"{tasks or 'none'}; allowed: {', '.join([*SCORERS, *BENCHMARKS])}"
        )
    loader = MediaLoader(
        gray=True,
        backend=data.video_backend,
        max_mismatch_seconds=data.max_mismatch_seconds,
        limits=data.limits,
    )
    return ValidationAnswers(
        spread(scored, wanted),
        tuple(config.sampler.budgets),
        Path(config.train.out).expanduser(),
        loader,
        config.train.answer_tokens,
    )


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Choose samples evenly over a list, so that every part of it is met; all where there are no more."""
    if count >= len(samples):
        return list(samples)
    return [samples[number * len(samples) // count] for number in range(count)]


@dataclass(frozen=True)
class ValidationAnswers:
    """Measures answers at each validation: error rates and accuracies per task and budget.

    Args:
        samples: what is answered; processes share them.
        points: budgets to answer at; the largest and the smallest of the model's space where there are none.
        run: the folder that the answers of the last validation are written to.
        max_new_tokens: of an answer.
    """

    samples: Sequence[Sample]
    points: tuple[Budget, ...]
    run: Path
    loader: MediaLoader
    max_new_tokens: int

    @torch.no_grad()
    def __call__(self, model: ElasticForConditionalGeneration, processor: ElasticProcessor) -> dict[str, float]:
        """Answer and score; every process calls this.

        Returns:
            `wer/asr/audio=/4` and so on by metric, task and budget, and `wer` and so on as their mean.

        Raises:
            MediaError, ValueError: a sample that cannot be answered; it is named.
        """
        state = PartialState()
        answerer = Answerer(model, processor, Decoding(max_new_tokens=self.max_new_tokens), loader=self.loader)
        mine = self.samples[state.process_index :: state.num_processes]
        parts = gather_json(
            [
                line
                for start in range(0, len(mine), BATCH_SIZE)
                for line in self._answer(answerer, mine[start : start + BATCH_SIZE])
            ]
        )
        lines = [line for part in parts for line in part]
        if state.is_main_process:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text_whole(self.run / VALIDATION_ANSWERS, text)
        return scores(lines)

    def _answer(self, answerer: Answerer, samples: Sequence[Sample]) -> list[Line]:
        processor = answerer.processor
        budgets = self.points or tuple(dict.fromkeys((processor.space.largest(), processor.space.smallest())))
        media = [processor.load_media(sample, loader=self.loader, budgets=budgets) for sample in samples]
        batch = processor.batch(samples, media, for_training=False)
        by_budget = answerer.answer_batch(batch, [[budget] * len(samples) for budget in budgets])
        lines: dict[tuple[str, str], Line] = {}
        for answers in by_budget:
            for sample, answer in zip(samples, answers, strict=True):
                # Budgets that are the same for the media of a sample count once, as in the loss.
                budget = str(answer.budget.only({part.medium for part in sample.media}))
                lines[sample.id, budget] = _line(sample, budget, answer.text)
        return list(lines.values())


def _line(sample: Sample, budget: str, answer: str) -> Line:
    judged = BENCHMARKS.get(sample.task)
    meta: dict[str, Any] = {} if judged is None else {"meta": {key: sample.meta[key] for key in judged.meta}}
    return {
        "id": sample.id,
        "task": sample.task,
        "kind": sample.kind,
        "budget": budget,
        "question": sample.messages[-2].text if len(sample.messages) > 1 else "",
        "references": references_of(sample),
        "hypothesis": answer,
        **meta,
    }


def scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Score lines by task and budget, and average each metric over both; what has no value is left out."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["task"], line["budget"]), []).append(dict(line))
    by_metric: dict[str, dict[str, float]] = {}
    for (task, budget), group in groups.items():
        score = scorer_of(task).score(group, 0)
        if score.value is not None:
            by_metric.setdefault(score.metric, {})[f"{score.metric}/{task}/{budget}"] = score.value
    means = {metric: sum(values.values()) / len(values) for metric, values in by_metric.items()}
    return means | {name: value for values in by_metric.values() for name, value in values.items()}
