"""A media file and a question to an answer at a budget, one or many at a time.

    answer = Answerer(*mllm.load("runs/demo"))
    found = answer(audio="hello.wav", budget="audio=/8")
    found.text, found.tokens                                  # 'place blue at f two now', {'audio': 12}

Knows a model, its processor and how to decode. Does not know references, metrics or tables.

Greedy, or beams without sampling, unless a temperature is asked for: the same request gives the same answer, alone or
in a batch, whatever the LLM's own generation config says.
"""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from mllm.budget import MEDIA, Budget, Cost, Extent, Space
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.expansion import Batch
from mllm.media import MediaError, MediaLoader
from mllm.modeling import ElasticForConditionalGeneration
from mllm.processing import ElasticProcessor, LoadedMedia
from mllm.timing import Timing, stopwatch

# What is asked when nothing is, by media; those of speech are the published systems' (and the built-in world's).
DEFAULT_PROMPTS: dict[tuple[str, ...], str] = {
    ("image",): "describe the picture.",
    ("audio",): "transcribe speech to text.",
    ("video",): "transcribe video to text.",
    ("audio", "video"): "transcribe speech and video to text.",
}
SEPARATORS = {"vicuna_v1": "\n"}
"""By chat format, what published data put between pictures and a question; a manifest's texts hold it themselves."""
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it was given.

    `tokens` are the soft tokens used, by medium; `is_trained` is false where a medium's budget was not in the trained
    space. `num_prompt_tokens` is the whole prompt, of which the first `num_shared_tokens` were read once together with
    other questions about the same media, and `num_new_tokens` counts the end token. `timing` is that of the whole
    batch, where it was asked for.
    """

    text: str
    budget: Budget
    tokens: Mapping[str, int]
    is_trained: bool
    num_prompt_tokens: int
    num_new_tokens: int
    timing: Timing | None = None
    num_shared_tokens: int = 0


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        num_beams: 1 is greedy. The prompt is read once, whatever the number.
        max_new_tokens: answers end there at the latest.
        length_penalty: beams are compared by the sum of their log-probabilities over length to this power; above 0
            favours long answers.
        temperature: samples at this temperature instead; needs `num_beams` 1.
        seed: of the samples.

    Raises:
        ValueError: numbers out of range, or sampling with beams.
    """

    num_beams: int = 1
    max_new_tokens: int = 64
    temperature: float | None = None
    seed: int = 0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for key in ("num_beams", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.temperature is not None and (self.temperature <= 0 or self.num_beams > 1):
            raise ValueError(
                f"temperature is {self.temperature} with num_beams {self.num_beams}; sampling needs a temperature "
                "above 0 and num_beams 1, and without a temperature the answer is deterministic"
            )
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise ValueError(f"length_penalty is {self.length_penalty} with num_beams 1; it compares beams")


@dataclass
class Answerer:
    """Answers with one model.

    Args:
        model: in eval mode, on the device it is to run on.
        processor: the one that belongs to it.
        decoding: how tokens are chosen.
        batch_size: most requests of one `generate` in `answer_samples`.
        loader: limits and decoders other than the default ones.
    """

    model: ElasticForConditionalGeneration = field(repr=False)
    processor: ElasticProcessor = field(repr=False)
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 8
    loader: MediaLoader | None = None

    def answer(
        self,
        text: str | None = None,
        *,
        image: Files = (),
        audio: Files = (),
        video: Files = (),
        budget: Budget | str = "",
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> Answer:
        """Answer one request about files.

        Args:
            text: the question; without one, what the model's own prompts or `DEFAULT_PROMPTS` ask of these media.
            image, audio, video: a file or several; in the prompt pictures stand before sounds before videos, all
                before the text.
            budget: see `mllm.budget`.
            on_text: called with each piece of the answer as soon as it is there (all at once with beams).
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
        budget: Budget | str = "",
        timed: bool = False,
    ) -> list[Answer]:
        """Answer several questions about the same files, which are encoded and read by the LLM once for all of them.

        Answers are those of one question at a time. All are answered in one batch, whatever `batch_size` is.

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
        budget: Budget | str,
        *,
        on_text: Callable[[str], None] | None = None,
        timed: bool = False,
    ) -> list[Answer]:
        prompts = {**DEFAULT_PROMPTS, **self.processor.prompts}
        separator = SEPARATORS.get(self.processor.elastic["chat_format"], "")
        requests = [request(files, text, prompts, separator=separator) for text in texts]
        samples, names = [sample for sample, _ in requests], requests[0][1]
        asked = Budget.parse(budget) if isinstance(budget, str) else budget
        if idle := asked.media - {part.medium for part in samples[0].media}:
            raise ValueError(f"the budget {str(asked)!r} names {min(idle)}, but the request holds none")
        try:
            loaded = self.processor.load_media(samples[0], loader=self.loader, budgets=[asked])
        except MediaError as error:
            name = names.get(error.path, error.path)
            raise MediaError(error.kind, name, error.reason) from error  # pyright: ignore[reportArgumentType]
        batch = self.processor.batch(samples, [loaded] * len(samples), for_training=False)
        return self.answer_batch(batch, [[asked] * len(samples)], on_text=on_text, timed=timed)[0]

    def answer_samples(self, samples: Sequence[Sample], budgets: Sequence[Budget | str]) -> list[Answer]:
        """Answer conversations, each at its own budget; a last assistant message is left out and asked for.

        Samples of one batch that hold the same files share them: they are loaded and encoded once, and what the prompts
        begin with alike is read once. So it pays to let questions about one picture follow each other.

        Raises:
            MediaError, ValueError: as `answer`; the sample is named.
        """
        if len(samples) != len(budgets):
            raise ValueError(f"{len(samples)} samples and {len(budgets)} budgets; give one budget per sample")
        asked = [Budget.parse(budget) if isinstance(budget, str) else budget for budget in budgets]
        answers: list[Answer] = []
        for start in range(0, len(samples), self.batch_size):
            rows = samples[start : start + self.batch_size]
            budgets: dict[Hashable, list[Budget]] = {}
            for sample, budget in zip(rows, asked[start : start + self.batch_size], strict=True):
                budgets.setdefault(sample.media_key, []).append(budget)
            known: dict[Hashable, list[LoadedMedia]] = {}
            for sample in rows:
                if (key := sample.media_key) not in known:
                    known[key] = self.processor.load_media(sample, loader=self.loader, budgets=budgets[key])
            batch = self.processor.batch(rows, [known[sample.media_key] for sample in rows], for_training=False)
            answers += self.answer_batch(batch, [asked[start : start + self.batch_size]])[0]
        return answers

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
        their questions begin (see `mllm.prefixes`).

        Args:
            batch: of `processor.batch(..., for_training=False)`.
            budgets: per draw, one budget per row.

        Returns:
            Per draw, one answer per row.

        Raises:
            ValueError: a budget a row cannot meet; the sample is named.
        """
        expanded = self.processor.expand(batch, budgets, left_padding=True, share_prefixes=True)
        inputs = {key: value.to(self.model.device) for key, value in expanded.inputs.items()}
        shares = "prefix_index" in inputs
        with stopwatch(self.model, timed, num_prefills=2 if shares else 1) as watch, self._chance():
            ids = self.model.generate(**inputs, **self._options(on_text))
        new_ids = [self._ended(new) for new in ids[:, inputs["input_ids"].shape[1] :].tolist()]
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
            )
            for text, budget, row, costs, length, new, num_shared in zip(
                texts, asked, rows, expanded.costs, prompt_lengths, new_ids, shared, strict=True
            )
        ]
        return [answers[start : start + len(batch.rows)] for start in range(0, len(answers), len(batch.rows))]

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and those of the LLM's generation config."""
        own = self.model.generation_config.eos_token_id
        found = [self.processor.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return sorted({token for token in found if token is not None})

    @contextmanager
    def _chance(self) -> Iterator[None]:
        """Samples come from the seed, and nobody else's random numbers move."""
        if self.decoding.temperature is None:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.decoding.seed)
            yield

    def _ended(self, ids: list[int]) -> list[int]:
        """An answer up to its end token; what follows waited for the batch mates."""
        ends = set(self.end_ids)
        return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]

    def _options(self, on_text: Callable[[str], None] | None) -> dict[str, Any]:
        """Arguments of `generate`, every one that could make a checkpoint's own config change the answer included."""
        how = self.decoding
        options: dict[str, Any] = {
            "num_beams": how.num_beams,
            "max_new_tokens": how.max_new_tokens,
            "do_sample": how.temperature is not None,
            "temperature": how.temperature or 1.0,
            "top_p": 1.0,
            "top_k": 0 if how.temperature is not None else 50,
            "repetition_penalty": 1.0,
            "length_penalty": how.length_penalty,
            "early_stopping": False,
            "num_return_sequences": 1,
            "min_length": 0,
            "min_new_tokens": None,  # both set would be warned of
            "no_repeat_ngram_size": 0,
            "eos_token_id": self.end_ids or None,
            "pad_token_id": self.processor.pad_id,
            # A soft token's place is no word, and there would be no soft token to put there.
            "suppress_tokens": sorted(self.processor.placeholder_ids.values()) or None,
        }
        if on_text is not None and how.num_beams == 1:
            options["streamer"] = _Pieces(self.processor.tokenizer, on_text)
        return options


class _Pieces(TextStreamer):
    """Hands finished words on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece, which may be empty."""
        if text:
            self.on_text(text)


def request(
    files: Mapping[str, Files],
    text: str | None = None,
    prompts: Mapping[tuple[str, ...], str] = DEFAULT_PROMPTS,
    *,
    separator: str = "",
) -> tuple[Sample, dict[str, str]]:
    """One request about files anywhere on the disk, as a sample.

    Args:
        separator: put between the files and the question where it does not begin with it already.

    Returns:
        The sample, and the name the caller gave each file by its path in the sample, for messages.

    Raises:
        ValueError: neither files nor text, or no default prompt for these media.
    """
    named = [(medium, os.fspath(file)) for medium in MEDIA for file in _several(files.get(medium, ()))]
    media = tuple(dict.fromkeys(medium for medium, _ in named))
    if text is None and not named:
        raise ValueError("nothing to answer: give text, or an image, audio or video file")
    if text is None and media not in prompts:
        raise ValueError(f"there is no default question about {' and '.join(media)} together; give text")
    # Links are followed here: whoever names a file may read it, while a manifest cannot leave its root.
    real = [os.path.realpath(file) for _, file in named]
    root = os.path.commonpath([os.path.dirname(path) for path in real]) if real else os.curdir
    paths = [Path(path).relative_to(root).as_posix() for path in real]
    parts = tuple(Media(medium, path) for (medium, _), path in zip(named, paths, strict=True))  # type: ignore[arg-type]
    question = prompts[media] if text is None else text
    if named and not question.startswith(separator):
        question = f"{separator}{question}"
    message = Message("user", (*parts, Text(question)))
    names = {path: name for path, (_, name) in zip([*paths, *real], [*named, *named], strict=True)}
    return Sample("request", (message,), task="generate", root=Path(root)), names


def _several(files: Files) -> list[str | os.PathLike[str]]:
    return [files] if isinstance(files, str | os.PathLike) else list(files)


def _shared_tokens(inputs: Mapping[str, Tensor]) -> list[int]:
    """Per row, how many of its tokens it shares with others."""
    index, lengths = inputs["prefix_index"], inputs["prefix_lengths"]
    return (lengths * (index.bincount(minlength=len(lengths)) > 1))[index].tolist()


def tokens_by_medium(extents: Sequence[Extent], costs: Sequence[Cost]) -> dict[str, int]:
    """Soft tokens of a request by medium, in the order of `MEDIA`."""
    sums: dict[str, int] = {}
    for medium in MEDIA:
        own = [cost.tokens for extent, cost in zip(extents, costs, strict=True) if extent.medium == medium]
        if own:
            sums[medium] = sum(own)
    return sums


def is_trained(extents: Sequence[Extent], costs: Sequence[Cost], space: Space) -> bool:
    """Whether training drew what every medium of a request costs, however the budget put it."""
    return all(space.media[extent.medium].is_trained_cost(cost) for extent, cost in zip(extents, costs, strict=True))
