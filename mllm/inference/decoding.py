"""How the tokens of an answer are chosen, as the arguments of transformers' `generate`.

Knows options and their limits. Does not know models, media or budgets.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from mllm.config.model import check_at_least


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
        static_cache: keep keys and values in a cache whose size is fixed at the start. On CUDA transformers then
            compiles the decoding step and replays it as a graph; on a CPU only the cache changes. Every row reads its
            own prompt, and needs `num_beams` 1.

    Raises:
        ValueError: numbers out of range, or sampling with beams.
    """

    num_beams: int = 1
    max_new_tokens: int = 64
    temperature: float | None = None
    seed: int = 0
    length_penalty: float = 1.0
    static_cache: bool = False

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

    def options(
        self,
        *,
        end_ids: Sequence[int],
        pad_id: int | None,
        suppressed_ids: Sequence[int],
        streamer: TextStreamer | None = None,
    ) -> dict[str, Any]:
        """Arguments of `generate`, every one that could make a checkpoint's own config change the answer included."""
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
    def chance(self) -> Iterator[None]:
        """Samples come from the seed, and nobody else's random numbers move."""
        if self.temperature is None:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield


class Pieces(TextStreamer):
    """Hands finished words on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece, which may be empty."""
        if text:
            self.on_text(text)
