"""Answers questions about media files at a budget, one or many at a time.

    answer = Answerer(*mllm.load("runs/demo"))
    result = answer(audio="hello.wav", budget="audio=/8")
    result.text, result.tokens                                # 'place blue at f two now', {'audio': 12}

Knows a model, its processor and how to decode. Does not know references, metrics or tables.

Decoding is greedy, or by beams without sampling, unless it has a temperature: the same request gives the same answer,
alone or in a batch, whatever the LLM's generation config says.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mllm.budget import Budget, BudgetInput
from mllm.config.long_audio import LongAudio
from mllm.data.manifest import Sample
from mllm.inference.automatic import BatchFeatures, answer_open
from mllm.inference.decoding import Decoding, generate_answers
from mllm.inference.grouping import group_by, number_per_batch
from mllm.inference.growth import GrowingPrompt, grows, kept_tokens
from mllm.inference.long_audio import Window, join_answers, lengths_of, load_windows
from mllm.inference.progressive import ProgressiveSession
from mllm.inference.reading import read_request
from mllm.inference.request import DEFAULT_PROMPTS, Answer, Files, is_trained, request, tokens_by_medium
from mllm.inference.timing import stopwatch
from mllm.kv_cache.system_prompt import SystemPrompt
from mllm.media import MediaLoader
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.processing.batch import Batch, EncodedSample
from mllm.processing.processor import ElasticProcessor
from mllm.router.choice import BudgetChooser, RequestCosts
from mllm.router.policy import MAX_GROWTHS
from mllm.router.router import Router

__all__ = [
    "DEFAULT_PROMPTS",
    "Answer",
    "Answerer",
    "Decoding",
    "is_trained",
    "request",
    "tokens_by_medium",
]


@dataclass
class Answerer:
    """Answers with one model.

    Media are files or values at hand, one or several: paths, bytes, PIL images, arrays (see `mllm.media.in_memory`).

    Args:
        model: in eval mode, on the device it is to run on.
        processor: the one that belongs to it.
        decoding: how tokens are chosen.
        batch_size: most requests of one `generate` in `answer_samples`.
        loader: limits and decoders other than the default ones.
        long_audio: how to read audio longer than its encoder's window; refused by default.
        constant_prompt: keep what the LLM reads of the text that all prompts begin with, from one batch to the next
            (see `mllm.kv_cache.system_prompt`).
        router: chooses where a budget says `auto` (see `mllm.router`).
        request_costs: what requests take in other units than tokens, for budgets such as `flops<=2e12`.
        max_growths: how often `auto` may discard an answer for one at a larger budget; 0 chooses once, before any.

    Raises:
        ValueError: a constant prompt with a static cache, or windows that do not go with the model's audio encoder.
    """

    model: ElasticForConditionalGeneration = field(repr=False)
    processor: ElasticProcessor = field(repr=False)
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 8
    loader: MediaLoader | None = None
    long_audio: LongAudio = field(default_factory=LongAudio)
    constant_prompt: bool = False
    router: Router | None = field(default=None, repr=False)
    request_costs: RequestCosts | None = field(default=None, repr=False)
    max_growths: int = MAX_GROWTHS
    _constant: SystemPrompt = field(default_factory=SystemPrompt, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.constant_prompt and not self.processor.shares_beginnings:
            raise ValueError("constant_prompt is true, but the prompts of this host cannot be read in parts")
        if self.constant_prompt and self.decoding.static_cache:
            raise ValueError("constant_prompt is true with static_cache; a static cache cannot take over another")
        if self.long_audio.mode == "chunk":
            lengths_of(self.long_audio, self.processor)  # before any sample fails for it

    @property
    def chooser(self) -> BudgetChooser:
        """What resolves open budgets."""
        return BudgetChooser(
            self.model,
            self.processor,
            self.router,
            self.request_costs,
            self.max_growths,
            kept_tokens=(
                partial(kept_tokens, processor=self.processor)
                if grows(self.model, self.processor, self.decoding)
                else None
            ),
        )

    def answer(
        self,
        text: str | None = None,
        *,
        image: Files = (),
        audio: Files = (),
        video: Files = (),
        budget: BudgetInput = "",
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> Answer:
        """Answers one request about files.

        Args:
            text: the question; if None, that of the model's prompts or `DEFAULT_PROMPTS` for these media.
            image, audio, video: one or several; in the prompt images stand before audio before videos, all before
                the text. Where the budget names audio and there is none, the audio of the video files is used.
            budget: see `mllm.budget`; a text, or amounts by medium.
            on_text: called with each piece of the answer as soon as it is there; all at once with beams, with an open
                budget, whose first answer may be discarded, or about audio in windows, whose answers are joined first.
            timed: measure; on a GPU this makes the host wait at each phase.

        Raises:
            MediaError: a file that is missing or cannot be read.
            ValueError: a medium the model does not take, a budget that cannot be met (with what is allowed), or nothing
                to ask.
        """
        files = {"image": image, "audio": audio, "video": video}
        return self._answer_about(files, [text], budget, on_text=on_text, timed=timed)[0]

    __call__ = answer

    def answer_questions(
        self,
        texts: Sequence[str],
        *,
        image: Files = (),
        audio: Files = (),
        video: Files = (),
        budget: BudgetInput = "",
        timed: bool = False,
    ) -> list[Answer]:
        """Answers several questions about the same files, which are encoded and read by the LLM once for all of them.

        Answers are those of one question at a time. All are answered in one batch, whatever `batch_size` is; about
        audio in windows, in one batch per window at most.

        Args:
            texts: at least one; the rest is as in `answer`.

        Raises:
            MediaError, ValueError: as `answer`.
        """
        if not texts:
            raise ValueError("nothing to answer: texts is empty")
        return self._answer_about({"image": image, "audio": audio, "video": video}, texts, budget, timed=timed)

    def _answer_about(
        self,
        files: Mapping[str, Files],
        texts: Sequence[str | None],
        budget: BudgetInput,
        *,
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> list[Answer]:
        samples, windows, budget = read_request(
            files,
            texts,
            budget,
            self.processor,
            loader=self.loader,
            long_audio=self.long_audio,
            chooser=self.chooser,
        )
        if len(windows) > 1:
            parts = self.answer_windows(samples, windows, [[budget] * len(samples)], timed=timed)
            answers = [join_answers(windows, of_windows) for of_windows in parts[0]]
            if on_text is not None:
                on_text(answers[0].text)
            return answers
        batch = self.processor.batch(samples, [windows[0].media] * len(samples), for_training=False)
        return self.answer_batch(batch, [[budget] * len(samples)], on_text=on_text, timed=timed)[0]

    def answer_windows(
        self,
        samples: Sequence[Sample],
        windows: Sequence[Window],
        budgets: Sequence[Sequence[Budget]],
        *,
        max_rows: int | None = None,
        timed: bool = False,
    ) -> list[list[list[Answer]]]:
        """Answers samples about the windows of the media they share; each window is encoded once for all.

        Args:
            budgets: lists of budgets, each with one per sample.
            max_rows: see `answer_in_parts`.

        Returns:
            Per list of budgets and sample, one answer per window.
        """
        answers: list[list[list[Answer]]] = [[[] for _ in samples] for _ in budgets]
        size = number_per_batch(max(self.batch_size // len(samples), 1), len(samples) * len(budgets), max_rows)
        size = 1 if timed else size  # the time of a batch is that of all its rows
        for start in range(0, len(windows), size):
            media = [window.media for window in windows[start : start + size]]
            media_of_rows = [of_window for of_window in media for _ in samples]
            batch = self.processor.batch([*samples] * len(media), media_of_rows, for_training=False)
            budgets_of_rows = [[*row_budgets] * len(media) for row_budgets in budgets]
            parts = self.answer_in_parts(batch, budgets_of_rows, max_rows=max_rows, timed=timed)
            for by_sample, of_rows in zip(answers, parts, strict=True):
                for number, answer in enumerate(of_rows):
                    by_sample[number % len(samples)].append(answer)
        return answers

    def answer_in_parts(
        self,
        batch: Batch,
        budgets: Sequence[Sequence[Budget]],
        *,
        max_rows: int | None = None,
        timed: bool = False,
    ) -> Iterator[list[Answer]]:
        """Answers as `answer_batch` does, in as many parts as keep to a number of rows; each encodes the media.

        Args:
            budgets: lists of budgets, each with one per row.
            max_rows: most rows of one `generate`; a list of budgets stays whole, though, whatever its length.

        Yields:
            Per list of budgets, one answer per row.
        """
        size = number_per_batch(len(budgets), len(batch.rows), max_rows)
        for start in range(0, len(budgets), size):
            yield from self.answer_batch(batch, budgets[start : start + size], timed=timed)

    def begin(self, *, image: Files, budget: BudgetInput = "") -> ProgressiveSession:
        """Begins a session about one image that is encoded once; its budget can grow at the price of what is new.

            session = answerer.begin(image="x.png", budget="image=64")
            session.answer("how many objects are there?")
            session.extend("image=256")
            session.answer("how many objects are there?")

        Raises:
            MediaError, ValueError: as `answer`, and anything but one image.
        """
        return ProgressiveSession(self.model, self.processor, self.decoding, image, budget, loader=self.loader)

    def _load(self, sample: Sample, budgets: Sequence[Budget]) -> list[Window]:
        media = [part.medium for part in sample.media]
        possible = [one for budget in budgets for one in self.chooser.candidates(budget, media)]
        return load_windows(sample, self.processor, self.long_audio, loader=self.loader, budgets=possible)

    def answer_samples(self, samples: Sequence[Sample], budgets: Sequence[BudgetInput]) -> list[Answer]:
        """Answers conversations, each at its budget; a last assistant message is left out, and answered instead.

        Samples of one batch that hold the same files share them: they are loaded and encoded once, and the beginning
        that their prompts have in common is read once. So it pays to let questions about one image follow each other.

        Raises:
            MediaError, ValueError: as `answer`; the sample is named.
        """
        if len(samples) != len(budgets):
            raise ValueError(f"{len(samples)} samples and {len(budgets)} budgets; give one budget per sample")
        parsed = [Budget.of(budget) for budget in budgets]
        answers: list[Answer] = []
        for start in range(0, len(samples), self.batch_size):
            stop = start + self.batch_size
            rows, row_budgets = samples[start:stop], parsed[start:stop]
            budgets_of_media: dict[Hashable, list[Budget]] = {}
            for sample, budget in zip(rows, row_budgets, strict=True):
                budgets_of_media.setdefault(sample.media_key, []).append(budget)
            firsts = [same_media[0] for same_media in group_by(rows, lambda sample: sample.media_key)]
            windows = {sample.media_key: self._load(sample, budgets_of_media[sample.media_key]) for sample in firsts}
            answers += self.answer_loaded([(sample, windows[sample.media_key]) for sample in rows], row_budgets)
        return answers

    def answer_loaded(self, rows: Sequence[tuple[Sample, list[Window]]], budgets: Sequence[Budget]) -> list[Answer]:
        """Answers samples whose media are loaded, each at its budget, in one batch.

        Args:
            rows: samples with the windows of their media; those of the same files share the same list. What comes in
                several windows is answered apart from the others.

        Raises:
            ValueError: a budget a row cannot meet; the sample is named.
        """
        whole = [number for number, (_, windows) in enumerate(rows) if len(windows) == 1]
        answers: dict[int, Answer] = {}
        if whole:
            samples, media = [rows[number][0] for number in whole], [rows[number][1][0].media for number in whole]
            batch = self.processor.batch(samples, media, for_training=False)
            answers |= zip(whole, self.answer_batch(batch, [[budgets[number] for number in whole]])[0], strict=True)
        split = [number for number, (_, windows) in enumerate(rows) if len(windows) > 1]
        for numbers in group_by(split, lambda number: rows[number][0].media_key):
            samples, windows = [rows[number][0] for number in numbers], rows[numbers[0]][1]
            parts = self.answer_windows(samples, windows, [[budgets[number] for number in numbers]])[0]
            answers |= {
                number: join_answers(windows, of_windows) for number, of_windows in zip(numbers, parts, strict=True)
            }
        return [answers[number] for number in range(len(rows))]

    def answer_batch(
        self,
        batch: Batch,
        budgets: Sequence[Sequence[Budget]],
        *,
        features: Mapping[str, Features] | None = None,
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> list[list[Answer]]:
        """Answers every row of a batch at several budgets, its media encoded once.

        Open budgets are resolved first, each row by itself (see `mllm.inference.automatic`).

        Rows that show the same items at one budget, at the same position behind the same text, are read once up to
        where their questions begin (see `mllm.kv_cache.shared_prefix`).

        Args:
            batch: of `processor.batch(..., for_training=False)`.
            budgets: lists of budgets, each with one per row.
            features: of `mllm.model.encoding.encode_media`, where the media of the batch were encoded before.

        Returns:
            Per list of budgets, one answer per row.

        Raises:
            ValueError: a budget a row cannot meet; the sample is named.
        """
        if not any(budget.is_open for of_rows in budgets for budget in of_rows):
            return self._answer_settled(batch, budgets, features=features, on_text=on_text, timed=timed)
        encoded = BatchFeatures(self.model, batch, timed=timed)
        known = encoded.features if features is None else features

        def begin_growing(row: EncodedSample) -> Callable[[Budget], Answer]:
            prompt = GrowingPrompt(self.model, self.processor, self.decoding, row, known)
            return partial(prompt.answer, timed=timed)

        settled = partial(self._answer_settled, features=known, timed=timed)
        encode = encoded.encode if features is None else lambda media: None
        answers = answer_open(Batch(batch.rows), budgets, self.chooser, settled, begin_growing, encode)
        if on_text is not None:
            on_text(answers[0][0].text)
        return [[_with_encoding(answer, encoded.milliseconds) for answer in of_rows] for of_rows in answers]

    @torch.no_grad()
    def _answer_settled(
        self,
        batch: Batch,
        budgets: Sequence[Sequence[Budget]],
        *,
        features: Mapping[str, Features] | None = None,
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> list[list[Answer]]:
        """Answers as `answer_batch` does, at budgets none of which is open.

        Args:
            features: of the media, where they have been encoded; the batch then needs no values.
        """
        can_share = not self.decoding.static_cache and self.processor.shares_beginnings
        expanded = self.processor.expand(batch, budgets, left_padding=True, share_prefixes=can_share)
        inputs: dict[str, Any] = {key: value.to(self.model.device) for key, value in expanded.inputs.items()}
        is_shared = "prefix_index" in inputs
        constant, num_prefills = None, 2 if is_shared else 1
        if self.constant_prompt:
            placeholders = self.processor.placeholder_ids.values()
            constant = self._constant.of_batch(self.model.model.language_model, expanded.inputs, placeholders)
            num_prefills += constant is not None and constant.cache is None
        with stopwatch(self.model, timed, num_prefills=num_prefills) as watch:
            inputs |= {"constant_prompt": constant, "features": features}
            generated = generate_answers(self.model, self.processor, self.decoding, inputs, on_text)
        prompt_lengths = expanded.inputs["attention_mask"].sum(dim=1).tolist()
        shared = _shared_tokens(expanded.inputs) if is_shared else [0] * len(generated)
        texts = self.processor.batch_decode([one.ids for one in generated], skip_special_tokens=True)
        if on_text is not None and self.decoding.num_beams > 1:
            on_text(texts[0].strip())
        flat_budgets = [budget for row_budgets in budgets for budget in row_budgets]
        rows = list(batch.rows) * len(budgets)
        answers = [
            Answer(
                text=text.strip(),
                budget=budget,
                tokens=tokens_by_medium([span.extent for span in row.spans], counts),
                is_trained=is_trained([span.extent for span in row.spans], counts, self.processor.space),
                num_prompt_tokens=length,
                num_new_tokens=len(one.ids),
                timing=watch.timing(),
                num_shared_tokens=num_shared,
                is_cut=not one.has_end,
                min_probability=one.min_probability,
                mean_log_probability=one.mean_log_probability,
            )
            for text, budget, row, counts, length, one, num_shared in zip(
                texts, flat_budgets, rows, expanded.token_counts, prompt_lengths, generated, shared, strict=True
            )
        ]
        return [answers[start : start + len(batch.rows)] for start in range(0, len(answers), len(batch.rows))]


def _with_encoding(answer: Answer, encoder_ms: float) -> Answer:
    """Adds the time that the media of a batch took to encode before its first pass."""
    if answer.timing is None:
        return answer
    return replace(answer, timing=replace(answer.timing, encoder_ms=answer.timing.encoder_ms + encoder_ms))


def _shared_tokens(inputs: Mapping[str, Tensor]) -> list[int]:
    """Counts, per row, the tokens it shares with others."""
    index, lengths = inputs["prefix_index"], inputs["prefix_lengths"]
    return (lengths * (index.bincount(minlength=len(lengths)) > 1))[index].tolist()
