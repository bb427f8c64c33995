"""A media file and a question to an answer at a budget, one or many at a time.

    answer = Answerer(*mllm.load("runs/demo"))
    found = answer(audio="hello.wav", budget="audio=/8")
    found.text, found.tokens                                  # 'place blue at f two now', {'audio': 12}

Knows a model, its processor and how to decode. Does not know references, metrics or tables.

Greedy, or beams without sampling, unless a temperature is asked for: the same request gives the same answer, alone or
in a batch, whatever the LLM's own generation config says.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm.budget import Budget, BudgetInput
from mllm.config.long_audio import LongAudio
from mllm.data.manifest import Sample
from mllm.inference.decoding import Decoding, Pieces
from mllm.inference.grouping import alike, number_in_pass
from mllm.inference.long_audio import Window, joined, lengths_of, load_windows
from mllm.inference.progressive import Growing
from mllm.inference.request import DEFAULT_PROMPTS, Answer, Files, is_trained, request, tokens_by_medium, with_sound
from mllm.inference.timing import stopwatch
from mllm.kv_cache.system_prompt import SystemPrompt
from mllm.media import Given, MediaError, MediaLoader
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.processing.requests import Request, fitting

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

    Media are files or what is at hand, one or several: paths, bytes, PIL images, arrays (see `mllm.media.given`).

    Args:
        model: in eval mode, on the device it is to run on.
        processor: the one that belongs to it.
        decoding: how tokens are chosen.
        batch_size: most requests of one `generate` in `answer_samples`.
        loader: limits and decoders other than the default ones.
        long_audio: what becomes of a sound longer than its encoder's window; refused by default.
        constant_prompt: keep what the LLM reads of the text that all prompts begin with, from one batch to the next
            (see `mllm.kv_cache.system_prompt`).

    Raises:
        ValueError: a constant prompt with a static cache, or windows that do not go with the model's encoder of sounds.
    """

    model: ElasticForConditionalGeneration = field(repr=False)
    processor: ElasticProcessor = field(repr=False)
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 8
    loader: MediaLoader | None = None
    long_audio: LongAudio = field(default_factory=LongAudio)
    constant_prompt: bool = False
    _constant: SystemPrompt = field(default_factory=SystemPrompt, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.constant_prompt and self.decoding.static_cache:
            raise ValueError("constant_prompt is true with static_cache; a static cache cannot take over another")
        if self.long_audio.mode == "chunk":
            lengths_of(self.long_audio, self.processor)  # before any sample fails for it

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
        """Answer one request about files.

        Args:
            text: the question; without one, what the model's own prompts or `DEFAULT_PROMPTS` ask of these media.
            image, audio, video: one or several; in the prompt images stand before sounds before videos, all before
                the text. Where the budget speaks of audio and there is none, the sound of the video files is heard.
            budget: see `mllm.budget`; a text, or amounts by medium.
            on_text: called with each piece of the answer as soon as it is there; all at once with beams, or about a
                sound in windows, whose answers are joined first.
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
        """Answer several questions about the same files, which are encoded and read by the LLM once for all of them.

        Answers are those of one question at a time. All are answered in one batch, whatever `batch_size` is; about a
        sound in windows, in one batch per window at most.

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
        samples, windows, asked = self._windows_of(files, texts, budget)
        if len(windows) > 1:
            parts = self.answer_windows(samples, windows, [[asked] * len(samples)], timed=timed)
            answers = [joined(windows, own) for own in parts[0]]
            if on_text is not None:
                on_text(answers[0].text)
            return answers
        batch = self.processor.batch(samples, [windows[0].media] * len(samples), for_training=False)
        return self.answer_batch(batch, [[asked] * len(samples)], on_text=on_text, timed=timed)[0]

    def answer_windows(
        self,
        samples: Sequence[Sample],
        windows: Sequence[Window],
        draws: Sequence[Sequence[Budget]],
        *,
        max_rows: int | None = None,
        timed: bool = False,
    ) -> list[list[list[Answer]]]:
        """Answer samples about the windows that the media they all show come in; each window is encoded once for all.

        Args:
            draws: per draw, one budget per sample.
            max_rows: see `answer_draws`.

        Returns:
            Per draw and sample, one answer per window.
        """
        found: list[list[list[Answer]]] = [[[] for _ in samples] for _ in draws]
        size = number_in_pass(max(self.batch_size // len(samples), 1), len(samples) * len(draws), max_rows)
        size = 1 if timed else size  # the time of a batch is that of all its rows
        for start in range(0, len(windows), size):
            media = [window.media for window in windows[start : start + size]]
            shown = [own for own in media for _ in samples]
            batch = self.processor.batch([*samples] * len(media), shown, for_training=False)
            budgets = [[*draw] * len(media) for draw in draws]
            passes = self.answer_draws(batch, budgets, max_rows=max_rows, timed=timed)
            for by_sample, answers in zip(found, passes, strict=True):
                for number, answer in enumerate(answers):
                    by_sample[number % len(samples)].append(answer)
        return found

    def answer_draws(
        self,
        batch: Batch,
        draws: Sequence[Sequence[Budget]],
        *,
        max_rows: int | None = None,
        timed: bool = False,
    ) -> Iterator[list[Answer]]:
        """Answer as `answer_batch` does, in as many passes as keep to a number of rows; each encodes the media.

        Args:
            max_rows: most rows of one `generate`; a draw is in one pass, though, however many rows the batch has.

        Yields:
            Per draw, one answer per row.
        """
        size = number_in_pass(len(draws), len(batch.rows), max_rows)
        for start in range(0, len(draws), size):
            yield from self.answer_batch(batch, draws[start : start + size], timed=timed)

    def begin(self, *, image: Files, budget: BudgetInput = "") -> Growing:
        """A session about one image that is encoded once, and whose budget can grow at the price of what is new.

            session = answerer.begin(image="x.png", budget="image=64")
            session.answer("how many objects are there?")
            session.extend("image=256")
            session.answer("how many objects are there?")

        Raises:
            MediaError, ValueError: as `answer`, and anything but one image.
        """
        return Growing(self, image, budget)

    def read_request(
        self, files: Mapping[str, Files], texts: Sequence[str | None], budget: BudgetInput
    ) -> tuple[list[Sample], list[LoadedMedia], Budget]:
        """Several questions about the same files as samples, their media, which are loaded once, and the budget.

        Raises:
            MediaError, ValueError: as `answer`.
        """
        samples, windows, asked = self._windows_of(files, texts, budget)
        return samples, windows[0].media, asked

    def _windows_of(
        self, files: Mapping[str, Files], texts: Sequence[str | None], budget: BudgetInput
    ) -> tuple[list[Sample], list[Window], Budget]:
        asked = Budget.of(budget)
        requests = self.requests_about(with_sound(files, asked), texts)
        samples, (_, names, given) = [request.sample for request in requests], requests[0]
        fitting(asked, samples)
        try:
            return samples, self._load(samples[0], [asked], given), asked
        except MediaError as error:
            name = names.get(error.path, error.path)
            raise MediaError(error.kind, name, error.reason) from error  # pyright: ignore[reportArgumentType]

    def _load(self, sample: Sample, budgets: Sequence[Budget], given: Sequence[Given | None] = ()) -> list[Window]:
        how = self.long_audio
        return load_windows(sample, self.processor, how, loader=self.loader, budgets=budgets, given=given)

    def requests_about(self, files: Mapping[str, Files], texts: Sequence[str | None]) -> list[Request]:
        """Several questions about the same media; see `request`."""
        prompts = {**DEFAULT_PROMPTS, **self.processor.prompts}
        return [request(files, text, prompts, separator=self.processor.separator) for text in texts]

    def answer_samples(self, samples: Sequence[Sample], budgets: Sequence[BudgetInput]) -> list[Answer]:
        """Answer conversations, each at its own budget; a last assistant message is left out and asked for.

        Samples of one batch that hold the same files share them: they are loaded and encoded once, and what the prompts
        begin with alike is read once. So it pays to let questions about one image follow each other.

        Raises:
            MediaError, ValueError: as `answer`; the sample is named.
        """
        if len(samples) != len(budgets):
            raise ValueError(f"{len(samples)} samples and {len(budgets)} budgets; give one budget per sample")
        asked = [Budget.of(budget) for budget in budgets]
        answers: list[Answer] = []
        for start in range(0, len(samples), self.batch_size):
            rows = samples[start : start + self.batch_size]
            wanted: dict[Hashable, list[Budget]] = {}
            for sample, budget in zip(rows, asked[start : start + self.batch_size], strict=True):
                wanted.setdefault(sample.media_key, []).append(budget)
            firsts = [own[0] for own in alike(rows, lambda sample: sample.media_key)]
            known = {sample.media_key: self._load(sample, wanted[sample.media_key]) for sample in firsts}
            answers += self._answer_rows(
                [(sample, known[sample.media_key]) for sample in rows], asked[start : start + self.batch_size]
            )
        return answers

    def _answer_rows(self, rows: Sequence[tuple[Sample, list[Window]]], budgets: Sequence[Budget]) -> list[Answer]:
        """Answer the rows of a batch together, but for those that come in windows."""
        whole = [place for place, (_, windows) in enumerate(rows) if len(windows) == 1]
        found: dict[int, Answer] = {}
        if whole:
            samples, media = [rows[place][0] for place in whole], [rows[place][1][0].media for place in whole]
            batch = self.processor.batch(samples, media, for_training=False)
            found |= zip(whole, self.answer_batch(batch, [[budgets[place] for place in whole]])[0], strict=True)
        split = [place for place, (_, windows) in enumerate(rows) if len(windows) > 1]
        for places in alike(split, lambda place: rows[place][0].media_key):
            samples, windows = [rows[place][0] for place in places], rows[places[0]][1]
            parts = self.answer_windows(samples, windows, [[budgets[place] for place in places]])[0]
            found |= {place: joined(windows, own) for place, own in zip(places, parts, strict=True)}
        return [found[place] for place in range(len(rows))]

    @torch.no_grad()
    def answer_batch(
        self,
        batch: Batch,
        budgets: Sequence[Sequence[Budget]],
        *,
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> list[list[Answer]]:
        """Answer every row of a batch at several budgets, its media encoded once.

        Rows that show the same items at one budget, in the same place behind the same text, are read once up to where
        their questions begin (see `mllm.kv_cache.shared_prefix`).

        Args:
            batch: of `processor.batch(..., for_training=False)`.
            budgets: per draw, one budget per row.

        Returns:
            Per draw, one answer per row.

        Raises:
            ValueError: a budget a row cannot meet; the sample is named.
        """
        share = not self.decoding.static_cache
        expanded = self.processor.expand(batch, budgets, left_padding=True, share_prefixes=share)
        inputs = {key: value.to(self.model.device) for key, value in expanded.inputs.items()}
        shares = "prefix_index" in inputs
        constant, num_prefills = None, 2 if shares else 1
        if self.constant_prompt:
            placeholders = self.processor.placeholder_ids.values()
            constant = self._constant.of_batch(self.model.model.language_model, expanded.inputs, placeholders)
            num_prefills += constant is not None and constant.cache is None
        with stopwatch(self.model, timed, num_prefills=num_prefills) as watch, self.decoding.chance():
            ids = self.model.generate(**inputs, **self.options(on_text), constant_prompt=constant)
        new_ids = [self.ended(new) for new in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        prompt_lengths = expanded.inputs["attention_mask"].sum(dim=1).tolist()
        shared = _shared_tokens(expanded.inputs) if shares else [0] * len(new_ids)
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        if on_text is not None and self.decoding.num_beams > 1:
            on_text(texts[0].strip())
        asked = [budget for draw in budgets for budget in draw]
        rows = list(batch.rows) * len(budgets)
        answers = [
            Answer(
                text=text.strip(),
                budget=budget,
                tokens=tokens_by_medium([run.extent for run in row.runs], costs),
                is_trained=is_trained([run.extent for run in row.runs], costs, self.processor.space),
                num_prompt_tokens=length,
                num_new_tokens=len(new),
                timing=watch.timing(),
                num_shared_tokens=num_shared,
                is_cut=self.is_cut(new),
            )
            for text, budget, row, costs, length, new, num_shared in zip(
                texts, asked, rows, expanded.token_counts, prompt_lengths, new_ids, shared, strict=True
            )
        ]
        return [answers[start : start + len(batch.rows)] for start in range(0, len(answers), len(batch.rows))]

    @property
    def _new_ids(self) -> list[int]:
        """Ids of tokens that the LLM was given rows for, and has never said."""
        return list((self.model.config.new_tokens or {}).values())

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and those of the LLM's generation config."""
        own = self.model.generation_config.eos_token_id
        found = [self.processor.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return sorted({token for token in found if token is not None})

    def ended(self, ids: list[int]) -> list[int]:
        """An answer up to its end token; what follows waited for the batch mates."""
        ends = set(self.end_ids)
        return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]

    def is_cut(self, ids: list[int]) -> bool:
        """Whether an answer of `ended` has no end, because it is as long as answers may be."""
        return not ids or ids[-1] not in self.end_ids

    def options(self, on_text: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Arguments of `generate`; `on_text` is called with the pieces of a greedy or sampled answer."""
        return self.decoding.options(
            end_ids=self.end_ids,
            pad_id=self.processor.pad_id,
            # A soft token's place is no word, and there would be no soft token to put there; nor are marks around it.
            suppressed_ids=sorted({*self.processor.placeholder_ids.values(), *self._new_ids}),
            streamer=None if on_text is None else Pieces(self.processor.tokenizer, on_text),
        )


def _shared_tokens(inputs: Mapping[str, Tensor]) -> list[int]:
    """Per row, how many of its tokens it shares with others."""
    index, lengths = inputs["prefix_index"], inputs["prefix_lengths"]
    return (lengths * (index.bincount(minlength=len(lengths)) > 1))[index].tolist()
