"""Keeps one answer while it is written: its tokens, its text as far as it is settled, and why it ended.

Knows ids, a tokenizer and rules for ending. Does not know models, batches or HTTP.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mllm.kv_cache.rows import RowCache
from mllm.serving.preparation import PromptRow

Ending = Literal["stop", "length", "repetition", "cancelled", "failed"]
MAX_PERIOD_TOKENS = 32
"""Longest stretch whose repetition is looked for."""
_UNFINISHED = "�"


@dataclass(frozen=True)
class AnswerRules:
    """Says how one answer is chosen and when it ends.

    Args:
        max_new_tokens: it ends there at the latest.
        temperature: draws at this temperature; None takes the best token.
        seed: of what is drawn; the same seed draws the same, whoever else is in the batch.
        stop: texts that end the answer and are not part of it.
        needs_text: whether the text is wanted while it is written.
        ignores_end: goes on behind the model's own end, as measurements need it.
        repetition_tokens: an answer whose last so many tokens are one short stretch again and again ends there; 0 never
            looks.
    """

    max_new_tokens: int
    temperature: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    needs_text: bool = False
    ignores_end: bool = False
    repetition_tokens: int = 0


@dataclass(frozen=True)
class ReadPrompt:
    """Holds what the LLM has read of an answer's prompt and of its tokens: all but the last one.

    Args:
        next_token: the one that it reads next.
        next_embed: (H,) what stands for it where a prompt ends with a soft token or a new one; None for text.
        expert_ids: of its adapter, by the name of the argument.
        positions: (1, 3) where its first token would stand if all had counted on, for hosts whose positions have three
            dimensions.
    """

    past: RowCache
    next_token: int
    expert_ids: Mapping[str, int]
    next_embed: Tensor | None = None
    positions: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the prompt and of the answer so far."""
        return self.past.num_tokens + 1


@dataclass(eq=False)
class AnswerRun:
    """Holds an answer while it is written. Only the thread that owns the model changes it; the client may cancel it.

    Args:
        prompt: what is answered.
        on_text: called with each piece of text that is settled, where the rules need text.
        on_end: called once, when the answer has ended.
        read: what the LLM has read of it, between two batches.
    """

    prompt: PromptRow
    rules: AnswerRules
    on_text: Callable[[str], None] = lambda piece: None
    on_end: Callable[[], None] = lambda: None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ending: Ending | None = None
    stop_text: str | None = None
    is_cancelled: bool = False
    on_first_token: Callable[[], None] = lambda: None
    read: ReadPrompt | None = None
    _sent: int = 0
    _generator: torch.Generator | None = None

    def take(self, token: int, ends: Collection[int], decode: Callable[[Sequence[int]], str]) -> None:
        """Add a token, hand out the text that is settled, and see whether the answer ends."""
        if self.is_cancelled:
            self.end("cancelled", decode)
            return
        self.ids.append(token)
        if len(self.ids) == 1:
            self.on_first_token()
        if (token in ends and not self.rules.ignores_end) or self._sees_stop(decode):
            self.end("stop", decode)
        elif len(self.ids) >= self.rules.max_new_tokens:
            self.end("length", decode)
        elif not self.rules.ignores_end and repeats(self.ids, self.rules.repetition_tokens):
            self.end("repetition", decode)
        elif self.rules.needs_text:
            self._send(self.text.rstrip().rstrip(_UNFINISHED).rstrip())

    def end(self, ending: Ending, decode: Callable[[Sequence[int]], str]) -> None:
        """End the answer; its text is then whole."""
        if self.ending is not None:
            return
        if self.stop_text is None:
            self.text = decode(self.ids).strip()
        self.ending, self.read = ending, None
        if self.rules.needs_text and ending not in ("cancelled", "failed"):
            self._send(self.text, is_whole=True)
        self.on_end()

    def noise(self, size: int) -> Tensor:
        """Make Gumbel noise (size,) from a generator of this answer alone; added to logits, the best token is a sample.

        So what is drawn depends on nobody else in the batch, and a pause changes nothing.
        """
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.rules.seed)
        uniform = torch.rand(size, generator=self._generator, dtype=torch.float64)
        return -(-uniform.log()).log().float()

    def _sees_stop(self, decode: Callable[[Sequence[int]], str]) -> bool:
        """Decode what is there where it is needed, and look for a text that ends the answer."""
        if not (self.rules.needs_text or self.rules.stop):
            return False
        self.text = decode(self.ids).lstrip()
        matches = [(self.text.find(stop), stop) for stop in self.rules.stop if stop in self.text]
        if not matches:
            return False
        start, self.stop_text = min(matches)
        self.text = self.text[:start].strip()
        return True

    def _send(self, settled: str, *, is_whole: bool = False) -> None:
        """Hand out what is new, but for an end that may be the beginning of a text that ends the answer."""
        if not is_whole:
            held = max((_overlap(settled, stop) for stop in self.rules.stop), default=0)
            settled = settled[: len(settled) - held].rstrip() if held else settled
        if len(settled) > self._sent:
            piece, self._sent = settled[self._sent :], len(settled)
            self.on_text(piece)


def _overlap(text: str, stop: str) -> int:
    """Count how many characters at the end of a text begin another, blanks between them not counted as an end."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


def repeats(ids: Sequence[int], num_tokens: int) -> bool:
    """Tell whether the last tokens are one stretch of at most 32 tokens again and again, at least twice."""
    if num_tokens == 0 or len(ids) < num_tokens:
        return False
    last = ids[-num_tokens:]
    longest = min(MAX_PERIOD_TOKENS, num_tokens // 2)
    return any(last[period:] == last[:-period] for period in range(1, longest + 1) if last[-1] == last[-1 - period])


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Make what turns ids to text, with a tokenizer of its own: another thread switches that of the processor."""
    import copy

    copied = copy.deepcopy(tokenizer)
    return lambda ids: copied.decode(list(ids), skip_special_tokens=True)
