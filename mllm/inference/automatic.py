"""Answers a batch whose budgets are open: at the budgets a router begins with, and again where a larger one pays.

Knows rows, choices and answers. Does not know how a settled budget is answered at; it is handed the function.

Every row decides by itself. Those that go on are answered together, each at its own budget, on features that have been
encoded once for all passes. Rows whose larger prompts begin with what has been read go on from there instead, one by
one (see `mllm.inference.growth`). What was read for answers that were discarded counts as used.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from mllm.budget import MEDIA, Budget
from mllm.inference.request import Answer
from mllm.inference.timing import PHASES, Timing
from mllm.model.encoding import encode_media
from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.processing.batch import Batch, EncodedSample
from mllm.router.choice import BudgetChooser, Choice

AnswerSettled = Callable[[Batch, Sequence[Sequence[Budget]]], list[list[Answer]]]
"""Answers every row of a batch at lists of settled budgets, each with one per row."""
BeginGrowing = Callable[[EncodedSample], Callable[[Budget], Answer]]
"""Begins a prompt that can grow, for one row; what it gives answers at one budget after another."""
EncodeMedia = Callable[[set[str]], None]
"""Encodes the items of some media, named by their encoders, unless that was done before."""


@dataclass
class _Run:
    """One row at one of its budgets, while it is answered."""

    row: int
    choice: Choice | None
    number: int
    settled: Budget
    grow: Callable[[Budget], Answer] | None = None
    answers: list[Answer] = field(default_factory=list)

    @property
    def budget(self) -> Budget:
        """The budget that it is to be answered at now."""
        return self.settled if self.choice is None else self.choice.budgets[self.number]

    def grows(self) -> bool:
        """Choose again, knowing the last answer; tell whether it is discarded for a larger budget."""
        if self.choice is None or len(self.answers) > self.choice.most_growths:
            return False
        before, self.number = self.number, self.choice.after(self.number, self.answers[-1].min_probability)
        return self.number != before


def answer_open(
    batch: Batch,
    budgets: Sequence[Sequence[Budget]],
    chooser: BudgetChooser,
    answer: AnswerSettled,
    begin_growing: BeginGrowing,
    encode: EncodeMedia,
) -> list[list[Answer]]:
    """Answer every row of a batch at lists of budgets, some of which are open.

    Args:
        batch: of `processor.batch(..., for_training=False)`.
        budgets: lists of budgets, each with one per row.
        answer: for the rows of this batch, or some of them.
        begin_growing: for rows of which something is kept when their budget grows.
        encode: called before each pass with the media it shows, so that what no budget shows is not encoded.

    Raises:
        ValueError: as `BudgetChooser.choose`, or what `answer` refuses.
    """
    runs = []
    for of_rows in budgets:
        for number, (row, budget) in enumerate(zip(batch.rows, of_rows, strict=True)):
            choice = chooser.choose(row, budget) if budget.is_open else None
            keeps = choice is not None and choice.most_growths > 0 and bool(choice.kept.any())
            grow = begin_growing(row) if keeps else None
            runs.append(_Run(number, choice, 0 if choice is None else choice.first, budget, grow))
    waiting = runs
    while waiting:
        encode({name for run in waiting for name in _shown(batch.rows[run.row], run.budget, chooser)})
        together = [run for run in waiting if run.grow is None]
        if together:
            rows = Batch([batch.rows[run.row] for run in together], batch.values)
            for run, one in zip(together, answer(rows, [[run.budget for run in together]])[0], strict=True):
                run.answers.append(one)
        for run in waiting:
            if run.grow is not None:
                run.answers.append(run.grow(run.budget))
        waiting = [run for run in waiting if run.grows()]
    finished = [_with_discarded(run.answers) for run in runs]
    size = len(batch.rows)
    return [finished[start : start + size] for start in range(0, len(finished), size)]


def _shown(row: EncodedSample, budget: Budget, chooser: BudgetChooser) -> list[str]:
    """List the encoders of the media that a row shows at a budget."""
    counts = row.token_counts(budget, chooser.processor.space)
    return [span.encoder for span, count in zip(row.spans, counts, strict=True) if count.tokens]


def _with_discarded(answers: Sequence[Answer]) -> Answer:
    """Return the last of several answers to one request, with everything that was read for all of them."""
    last, discarded = answers[-1], tuple(answers[:-1])
    if not discarded:
        return last
    tokens = {m: sum(one.tokens.get(m, 0) for one in answers) for m in MEDIA if m in last.tokens}
    timings = [one.timing for one in answers if one.timing is not None]
    timing = Timing(*(sum(getattr(one, phase) for one in timings) for phase in PHASES)) if timings else None
    return replace(last, tokens=tokens, timing=timing, discarded=discarded)


class BatchFeatures:
    """Encodes the media of a batch, each the first time it is wanted.

    Args:
        features: what has been encoded already, by medium; it grows.
        milliseconds: it took, 0 unless `timed`.
    """

    def __init__(self, model: ElasticForConditionalGeneration, batch: Batch, *, timed: bool) -> None:
        self._model, self._batch, self._timed = model, batch, timed
        self.features: dict[str, Features] = {}
        self.milliseconds = 0.0

    @torch.no_grad()
    def encode(self, media: set[str]) -> None:
        """Encode the items of some media that have not been encoded."""
        keys = [key for medium in media - self.features.keys() for key in (VALUE_KEYS[medium], SIZE_KEYS[medium])]
        values = {key: self._batch.values[key] for key in keys if key in self._batch.values}
        device = self._model.device
        start = time.perf_counter()
        self.features |= encode_media(self._model, values, device)
        if self._timed and device.type != "cpu":
            torch.accelerator.synchronize(device)
        self.milliseconds += 1000 * (time.perf_counter() - start) if self._timed else 0.0
