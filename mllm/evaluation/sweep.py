"""Works off the work list: every sample is read and encoded once and answered at all its budgets together.

Samples of a batch that hold the same files share them: these are loaded and encoded once for all their questions, and
what the prompts begin with alike is read once (see `mllm.kv_cache.shared_prefix`). Work is ordered so that such samples
meet.

Knows an answerer, the work list and the store. Does not know metrics or how results are shown.

Whatever goes wrong with a sample or a budget becomes a line with an `error`; anything else stops the sweep, which can
then be resumed.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from mllm.budget import Budget
from mllm.data.manifest import Sample
from mllm.evaluation.answer_store import AnswerStore, Line
from mllm.evaluation.flops import attention_flops, llm_flops, published_flops, row_cost
from mllm.evaluation.noise import EvaluationNoise
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.evaluation.work_list import Work, references_of, untrained_message
from mllm.inference.answerer import Answer, Answerer, is_trained
from mllm.inference.grouping import group_by, number_per_batch
from mllm.inference.long_audio import Window, join_answers, load_windows
from mllm.media import Audio, MediaError, MediaLoader
from mllm.processing.batch import EncodedSample, check_length
from mllm.processing.processor import LoadedMedia


@dataclass(frozen=True)
class Loaded:
    """A work item with the media of its sample."""

    work: Work
    media: list[LoadedMedia]
    windows: list[Window] = field(default_factory=list)
    """The windows of long audio, one otherwise; `media` are those of the first."""


@dataclass(frozen=True)
class Sweep:
    """Answers work and keeps the answers.

    Args:
        answerer: with its decoding and batch size.
        store: of this rank.
        noise: mixed into the audio of work with a ratio.
        seed: random seed of the noise, which is a function of seed, sample and ratio.
        loader: decodes files; the default one when None.
        allow_untrained: answer at amounts that training did not sample; refused otherwise, sample by sample where only
            the sample tells what an amount is.
        max_rows: most rows of one `generate`, a row being a sample at one budget.
    """

    answerer: Answerer
    store: AnswerStore
    noise: Audio | None = None
    seed: int = 0
    loader: MediaLoader | None = None
    allow_untrained: bool = False
    max_rows: int | None = None
    on_progress: Callable[[int], None] = field(default=lambda _: None)
    """Called with the number of answers that have been added."""

    def run(self, work: Sequence[Work], *, rank: int = 0, num_ranks: int = 1) -> None:
        """Answers this rank's part of the work list, leaving out what has been answered. Failures are tried again."""
        self.store.repair()
        done = {key for key, line in self.store.read().items() if "error" not in line}
        open_work = []
        for item in _work_of_rank(work, rank, num_ranks):
            pending = tuple(budget for budget in item.budgets if item.key(budget) not in done)
            self.on_progress(len(item.budgets) - len(pending))
            if pending:
                open_work.append(replace(item, budgets=pending))
        for batch in _batches(open_work, self.answerer.batch_size, self.max_rows):
            lines = list(self._answer(batch))
            self.store.append(lines)
            self.on_progress(len(lines))

    def _answer(self, batch: Sequence[Work]) -> Iterator[Line]:
        """Loads the media of a batch, turns what cannot be answered into failures, and answers the rest."""
        loaded, budgets_of_items = [], []
        windows_of_media: dict[Hashable, list[Window]] = {}
        for work in batch:
            try:
                if work.media_key not in windows_of_media:
                    windows_of_media[work.media_key] = self._load(work)
                windows = windows_of_media[work.media_key]
                item = Loaded(work, windows[0].media, windows)
                row = self._rows([item])[0]
            except ValueError as error:
                yield from (_failure(work, budget, error) for budget in work.budgets)
                continue
            possible = []
            for budget in work.budgets:
                try:
                    self._check(row, budget)
                    possible.append(budget)
                except ValueError as error:
                    yield _failure(work, budget, error)
            loaded.append(item)
            budgets_of_items.append(tuple(possible))
        # A budget that one sample cannot meet must not cost the others theirs, so items are grouped by what they can.
        for budgets in dict.fromkeys(budgets_of_items):
            if budgets:
                items = [item for item, possible in zip(loaded, budgets_of_items, strict=True) if possible == budgets]
                yield from self._answer_at(items, budgets)

    def _answer_at(self, items: Sequence[Loaded], budgets: Sequence[Budget]) -> Iterator[Line]:
        """Answers at the same budgets: together, but for those that come in windows, whose questions share them."""
        if whole := [item for item in items if len(item.windows) == 1]:
            yield from self._answer_together(whole, budgets)
        split = [item for item in items if len(item.windows) > 1]
        for same_media in group_by(split, lambda item: item.work.media_key):
            yield from self._answer_windows(same_media, budgets)

    def _check(self, row: EncodedSample, budget: Budget) -> None:
        """Refuses a budget that a row cannot be answered at.

        Raises:
            ValueError: the row cannot meet it, is longer with it than the LLM reads, or it is untrained and refused.
        """
        if budget.is_open:
            self.answerer.chooser.choose(row, budget)
            return
        space = self.answerer.processor.space
        counts = row.token_counts(budget, space)
        check_length(row, counts, self.answerer.processor.context_tokens)
        if not self.allow_untrained and not is_trained([span.extent for span in row.spans], counts, space):
            raise ValueError(f"sample {row.sample_id!r}: {untrained_message(budget, space)}")

    def _answer_together(self, items: Sequence[Loaded], budgets: Sequence[Budget]) -> Iterator[Line]:
        samples, media = [item.work.sample for item in items], [item.media for item in items]
        batch = self.answerer.processor.batch(samples, media, for_training=False)
        of_rows = [[budget] * len(items) for budget in budgets]
        parts = self.answerer.answer_in_parts(batch, of_rows, max_rows=self.max_rows)
        for budget, answers in zip(budgets, parts, strict=True):
            for item, row, answer in zip(items, batch.rows, answers, strict=True):
                yield self._line(item, row, answer, budget)

    def _answer_windows(self, items: Sequence[Loaded], budgets: Sequence[Budget]) -> Iterator[Line]:
        """Yields one line per budget and sample about long audio that is the same for all; see `_joined_line`."""
        samples, windows = [item.work.sample for item in items], items[0].windows
        of_samples = [[budget] * len(items) for budget in budgets]
        by_budget = self.answerer.answer_windows(samples, windows, of_samples, max_rows=self.max_rows)
        for number, item in enumerate(items):
            rows = self._rows([Loaded(item.work, window.media) for window in windows])
            for budget, answers in zip(budgets, by_budget, strict=True):
                yield self._joined_line(item, rows, answers[number], budget)

    def _joined_line(
        self, item: Loaded, rows: Sequence[EncodedSample], answers: Sequence[Answer], budget: Budget
    ) -> Line:
        """Makes the line of a sample that was answered window by window; tokens and cost are those of all windows."""
        lines = [
            self._line(Loaded(item.work, window.media), row, answer, budget)
            for window, row, answer in zip(item.windows, rows, answers, strict=True)
        ]
        costs = [line["cost"] for line in lines]
        whole = self._line(item, rows[0], join_answers(item.windows, answers), budget)
        cost = None if None in costs else {key: sum(of_window[key] for of_window in costs) for key in costs[0]}
        return whole | {"seconds": round(item.windows[-1].stop, 3), "cost": cost} | _served(budget, answers)

    def _load(self, work: Work) -> list[Window]:
        return load_windows(
            work.sample,
            self.answerer.processor,
            self.answerer.long_audio,
            loader=self.loader,
            noise=self._noise_of(work),
            budgets=[one for budget in work.budgets for one in self.answerer.chooser.candidates(budget, work.media)],
        )

    def _noise_of(self, work: Work) -> Callable[[Audio], Audio] | None:
        ratio = work.snr_db
        if ratio is None:
            return None
        assert self.noise is not None
        return EvaluationNoise(self.noise, self.seed).of(work.sample.id, ratio)

    def _rows(self, items: Sequence[Loaded]) -> Sequence[EncodedSample]:
        samples: list[Sample] = [item.work.sample for item in items]
        media = [item.media for item in items]
        return self.answerer.processor.batch(samples, media, for_training=False, with_values=False).rows

    def _line(self, item: Loaded, row: EncodedSample, answer: Answer, budget: Budget) -> Line:
        return {
            **_facts(item.work, budget),
            **_served(budget, [answer]),
            "hypothesis": answer.text,
            "is_trained": answer.is_trained,
            "tokens": dict(answer.tokens),
            "prompt_tokens": answer.num_prompt_tokens,
            "new_tokens": answer.num_new_tokens,
            "is_cut": answer.is_cut,
            "min_probability": round(answer.min_probability, 6),
            "mean_log_probability": round(answer.mean_log_probability, 6),
            "seconds": _seconds(row),
            "cost": self._cost(item, row, answer),
        }

    def _cost(self, item: Loaded, row: EncodedSample, answer: Answer) -> dict[str, int] | None:
        """Computes FLOPs by part and bytes of cache, of the sample asked alone; None for a model without a formula.

        What it shared with other questions about its media is counted whole, so that no figure depends on company.
        Answers that a router discarded count, but for the media that were encoded once for all of them.
        """
        costs = [self._cost_of_one(item, row, one) for one in (*answer.discarded, answer)]
        if costs[0] is None:
            return None
        known = [cost for cost in costs if cost is not None]
        summed = {key: sum(cost[key] for cost in known) for key in known[0]}
        encoded_again = sum(cost["encoder"] for cost in known[:-1])
        last = {key: known[-1][key] for key in ("encoder", "kv_bytes")}
        return summed | last | {"total": summed["total"] - encoded_again}

    def _cost_of_one(self, item: Loaded, row: EncodedSample, answer: Answer) -> dict[str, int] | None:
        config = self.answerer.model.config
        cost = row_cost(
            self.answerer.model,
            row,
            row.token_counts(answer.budget, self.answerer.processor.space),
            frame_pixels=[medium.values.shape[-2:] for medium in item.media],
            num_prompt_tokens=answer.num_prompt_tokens,
            num_new_tokens=answer.num_new_tokens,
            num_beams=self.answerer.decoding.num_beams,
        )
        if cost is None:
            return None
        parts = {part: getattr(cost, part) for part in ("encoder", "compressor", "prefill", "decode")}
        text, kept = config.text_config, answer.num_kept_tokens
        known = llm_flops(text, num_tokens=kept, num_logits=0, adapter=config.adapter)
        read = answer.num_prompt_tokens - kept
        return {
            **parts,
            "prefill": cost.prefill - known,
            "total": cost.total - known,
            "published": published_flops(text, num_tokens=read, adapter=config.adapter),
            "attention": attention_flops(text, num_tokens=read, past_tokens=kept),
            "kv_bytes": cost.kv_bytes,
        }


def _served(budget: Budget, answers: Sequence[Answer]) -> Line:
    """Tells what an open budget became: those of all windows, and how many answers were discarded on the way."""
    if not budget.is_open:
        return {}
    served = dict.fromkeys(str(answer.budget) for answer in answers)
    return {"served": ";".join(served), "num_discarded": sum(len(answer.discarded) for answer in answers)}


def _seconds(row: EncodedSample) -> float | None:
    """Tells how long the longest audio or video of a row lasts."""
    lasts = [
        float(span.extent.length / span.extent.frames_per_second) for span in row.spans if span.extent.frames_per_second
    ]
    return round(max(lasts), 3) if lasts else None


def _work_of_rank(work: Sequence[Work], rank: int, num_ranks: int) -> Iterator[Work]:
    """Deals out the work by files, so that all questions about a file go to one rank, in the order of the work."""
    number_of_media: dict[Hashable, int] = {}
    return (
        item for item in work if number_of_media.setdefault(item.media_key, len(number_of_media)) % num_ranks == rank
    )


def _batches(work: Sequence[Work], size: int, max_rows: int | None = None) -> Iterator[list[Work]]:
    """Batches work of the same media and budgets, questions about the same files side by side, else in its order.

    At most `size` samples, and no more rows than `max_rows` unless a single sample has more budgets than that.
    """
    number_of_media: dict[Hashable, int] = {}
    for item in work:
        number_of_media.setdefault(item.media_key, len(number_of_media))

    def batch_key(item: Work) -> tuple:
        return item.media, tuple(map(str, item.budgets))

    def order(item: Work) -> tuple:
        return *batch_key(item), number_of_media[item.media_key]

    for _, group in groupby(sorted(work, key=order), key=batch_key):
        items = list(group)
        count = number_per_batch(size, len(items[0].budgets), max_rows)
        yield from (items[start : start + count] for start in range(0, len(items), count))


def _facts(work: Work, budget: Budget) -> Line:
    judged = BENCHMARKS.get(work.sample.task)
    meta = {} if judged is None else {"meta": {key: work.sample.meta[key] for key in judged.meta}}
    return {
        "set": work.set_name,
        "id": work.sample.id,
        "snr_db": work.snr_db,
        "budget": str(budget),
        "media_stamp": work.media_stamp,
        "task": work.sample.task,
        "kind": work.sample.kind,
        "references": references_of(work.sample),
        **meta,
    }


def _failure(work: Work, budget: Budget, error: ValueError) -> Line:
    kind = error.kind if isinstance(error, MediaError) else "refused"
    return {**_facts(work, budget), "error": {"kind": kind, "reason": str(error)}}
