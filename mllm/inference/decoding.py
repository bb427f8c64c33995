"""Decides how the tokens of an answer are chosen, says it as the arguments of transformers' `generate`, and runs it.

Knows options, their limits, and which tokens end an answer. Does not know media or budgets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import LogitsProcessorList, TextStreamer

from mllm.config.decoding_options import DecodingOptions
from mllm.config.model import check_at_least
from mllm.inference.confidence import TokenProbabilities, confidence_of
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        num_beams: 1 is greedy. The prompt is read once, whatever the number.
        max_new_tokens: answers end there at the latest.
        length_penalty: beams are compared by the sum of their log-probabilities over length to this power; above 0
            favours long answers.
        temperature: samples at this temperature instead; needs `num_beams` 1.
        seed: random seed of the samples.
        static_cache: keep keys and values in a cache whose size is fixed at the start. On CUDA transformers then
            compiles the decoding step and replays it as a graph; on a CPU only the cache changes. Every row reads its
            own prompt, and needs `num_beams` 1.
        ignores_end: decode `max_new_tokens` whatever the model says, as measurements of time need it.

    Raises:
        ValueError: numbers out of range, or sampling with beams.
    """

    num_beams: int = 1
    max_new_tokens: int = 64
    temperature: float | None = None
    seed: int = 0
    length_penalty: float = 1.0
    static_cache: bool = False
    ignores_end: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, ("num_beams", "max_new_tokens"))
        if self.temperature is not None and (self.temperature <= 0 or self.num_beams > 1):
            raise ValueError(
                f"temperature is {self.temperature} with num_beams {self.num_beams}; sampling needs a temperature "
                "above 0 and num_beams 1, and without a temperature the answer is deterministic"
            )
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise ValueError(f"length_penalty is {self.length_penalty} with num_beams 1; it compares beams")
        if self.static_cache and self.num_beams > 1:
            raise ValueError(f"static_cache is true with num_beams {self.num_beams}; beams share a growing cache")

    @classmethod
    def of(cls, options: DecodingOptions) -> "Decoding":
        """Takes what the options of a command say.

        Raises:
            ValueError: as the class.
        """
        return cls(**{field.name: getattr(options, field.name) for field in fields(DecodingOptions)})

    def options(
        self,
        *,
        end_ids: Sequence[int],
        pad_id: int | None,
        suppressed_ids: Sequence[int],
        streamer: TextStreamer | None = None,
    ) -> dict[str, Any]:
        """Lists the arguments of `generate`, with every one by which a checkpoint's config could change the answer."""
        sampled = self.temperature is not None
        options: dict[str, Any] = {
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": sampled,
            "temperature": self.temperature or 1.0,
            "top_p": 1.0,
            "top_k": 0 if sampled else 50,
            "repetition_penalty": 1.0,
            "length_penalty": self.length_penalty,
            "early_stopping": False,
            "num_return_sequences": 1,
            "min_length": 0,
            "min_new_tokens": None,  # both set would be warned of
            "no_repeat_ngram_size": 0,
            "eos_token_id": list(end_ids) or None,
            "pad_token_id": pad_id,
            "suppress_tokens": list(suppressed_ids) or None,
        }
        if self.static_cache:
            options["cache_implementation"] = "static"
        if streamer is not None and self.num_beams == 1:
            options["streamer"] = streamer
        return options

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Lets samples come from the seed, and moves nobody else's random numbers."""
        if self.temperature is None:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield


def end_ids_of(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, decoding: Decoding | None = None
) -> list[int]:
    """Lists the tokens that end an answer: the tokenizer's and those of the LLM's generation config."""
    if decoding is not None and decoding.ignores_end:
        return []
    ids = model.generation_config.eos_token_id
    ends = [processor.tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
    return sorted({token for token in ends if token is not None})


def up_to_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Cuts an answer behind its end token; what follows waited for the batch mates."""
    return ids[: next((number + 1 for number, token in enumerate(ids) if token in end_ids), len(ids))]


def has_no_end(ids: list[int], end_ids: Sequence[int]) -> bool:
    """Tells whether an answer of `up_to_end` has no end, because it is as long as answers may be."""
    return not ids or ids[-1] not in end_ids


def generate_options(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    decoding: Decoding,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Lists the arguments of `generate` for one model.

    Args:
        on_text: called with the pieces of a greedy or sampled answer as they come.
    """
    return decoding.options(
        end_ids=end_ids_of(model, processor, decoding),
        pad_id=processor.pad_id,
        suppressed_ids=model.config.unsaid_ids,
        streamer=None if on_text is None else WordStreamer(processor.tokenizer, on_text),
    )


@dataclass(frozen=True)
class Generated:
    """Holds the tokens of one answer up to its end, and how probable they were.

    Args:
        ids: the end token included.
        has_end: false where the model had not ended when `max_new_tokens` were there.
        min_probability: the smallest probability of any of the tokens, in [0, 1].
        mean_log_probability: the mean of their log-probabilities, at most 0.
    """

    ids: list[int]
    has_end: bool
    min_probability: float
    mean_log_probability: float


def generate_answers(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    decoding: Decoding,
    inputs: Mapping[str, Any],
    on_text: Callable[[str], None] | None = None,
) -> list[Generated]:
    """Generate one answer per row.

    Args:
        inputs: what `generate` takes of prompts and media; `input_ids` (B, S) among it.
        on_text: called with the pieces of a greedy or sampled answer as they come.
    """
    ends = end_ids_of(model, processor, decoding)
    # A beam search goes on with the best of so many tokens of all its beams together, so no beam gives more of them.
    num_candidates = decoding.num_beams * max(2, 1 + len(ends)) if decoding.num_beams > 1 else 0
    probabilities = TokenProbabilities(num_candidates)
    options = generate_options(model, processor, decoding, on_text)
    with decoding.seeded():
        output = model.generate(
            **inputs, **options, logits_processor=LogitsProcessorList([probabilities]), return_dict_in_generate=True
        )
    num_prompt_tokens = inputs["input_ids"].shape[1]
    of_tokens = probabilities.of_answers(output.sequences, num_prompt_tokens, getattr(output, "beam_indices", None))
    answers = []
    for ids, of_ids in zip(output.sequences[:, num_prompt_tokens:].tolist(), of_tokens.tolist(), strict=True):
        new = up_to_end(ids, ends)
        answers.append(Generated(new, not has_no_end(new, ends), *confidence_of(of_ids[: len(new)])))
    return answers


class WordStreamer(TextStreamer):
    """Passes finished words on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Passes on each piece that transformers finishes, unless it is empty."""
        if text:
            self.on_text(text)
