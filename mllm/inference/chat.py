"""Holds a conversation about files with a model that is loaded once: what was said, the files shown, the budget.

    chat = ChatSession(answerer, budget="image=16")
    chat.add("image", "scene.png")
    chat.ask("what colour is the circle?").text

Files are decoded and encoded when they come; later questions reuse their features. Knows an answerer. Does not know
terminals.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mllm.budget import MEDIA, Budget, BudgetInput
from mllm.inference.answerer import Answerer
from mllm.inference.long_audio import Window, join_answers
from mllm.inference.reading import check_media, load_request
from mllm.inference.request import DEFAULT_PROMPTS, Answer, default_question, request
from mllm.model.encoding import encode_media
from mllm.model.modeling import Features
from mllm.processing.batch import Batch
from mllm.processing.requests import Request, read_chat


@dataclass
class ChatSession:
    """Holds a conversation with one model.

    Args:
        answerer: with its decoding, limits and treatment of long audio.
        budget: of everything that is shown from now on; may name media that are yet to come.
        remembers: shows the model what was said before. Otherwise every question stands alone behind all files, as a
            model that was trained on single questions wants it.

    Raises:
        ValueError: a budget that speaks of a medium the model does not take.
    """

    answerer: Answerer
    budget: Budget = field(default_factory=Budget)
    remembers: bool = True
    _turns: list[dict[str, Any]] = field(default_factory=list, init=False)
    _shown: list[tuple[str, str]] = field(default_factory=list, init=False)
    _waiting: list[tuple[str, str]] = field(default_factory=list, init=False)
    _encoded: "tuple[Hashable, list[Window], Mapping[str, Features]] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.set_budget(self.budget)

    @property
    def files(self) -> list[tuple[str, str]]:
        """List the files of the conversation, as (medium, path); the last ones may be waiting for a question."""
        return [*self._shown, *self._waiting]

    def add(self, medium: str, path: str) -> None:
        """Add a file, which is shown with the next question.

        Raises:
            MediaError, ValueError: it cannot be read, or the model does not take it; then nothing is added.
        """
        processor = self.answerer.processor
        load_request(
            request({medium: [path]}, ""),
            self.answerer.chooser.candidates(self.budget, [medium]),
            processor,
            loader=self.answerer.loader,
            long_audio=self.answerer.long_audio,
        )
        self._waiting.append((medium, path))

    def set_budget(self, budget: BudgetInput) -> None:
        """Answer at another budget from now on.

        Raises:
            ValueError: no budget, or one that speaks of a medium the model does not take.
        """
        budget = Budget.of(budget)
        check_media(budget, self.answerer.processor)
        self.budget = budget

    def clear(self) -> None:
        """Forget everything that was said and shown."""
        self._turns, self._shown, self._waiting, self._encoded = [], [], [], None

    @torch.no_grad()
    def ask(self, text: str | None = None, *, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer a question about what was shown; what fails leaves the conversation as it was.

        Args:
            text: None asks the default question about the files that wait, or about all where none does.
            on_text: called with each piece of the answer; all at once with beams or windows.

        Raises:
            MediaError: a file that has gone since it was added.
            ValueError: a budget that cannot be met, a conversation longer than the LLM reads, or nothing to ask.
        """
        processor = self.answerer.processor
        files = self._waiting if self.remembers and self._waiting else self.files
        if text is None:
            prompts = {**DEFAULT_PROMPTS, **processor.prompts}
            text = default_question({medium for medium, _ in files}, prompts)
        new = self._waiting if self.remembers else self.files
        parts = [{"type": medium, medium: path} for medium in MEDIA for kind, path in new if kind == medium]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        turns = [*self._turns, turn] if self.remembers else [turn]
        answer = self._answer(read_chat(turns, separator=processor.separator), on_text)
        self._shown, self._waiting = self.files, []
        if self.remembers:
            self._turns = [*turns, {"role": "assistant", "content": answer.text}]
        return answer

    def _answer(self, asked: Request, on_text: Callable[[str], None] | None) -> Answer:
        answerer, sample = self.answerer, asked.sample
        key = (sample.media_key, self.budget if answerer.processor.loads_by_budget else None)
        if self._encoded is not None and self._encoded[0] == key:
            windows = self._encoded[1]
        else:
            budgets = answerer.chooser.candidates(self.budget, [part.medium for part in sample.media])
            windows = load_request(
                asked, budgets, answerer.processor, loader=answerer.loader, long_audio=answerer.long_audio
            )
        if len(windows) > 1:
            parts = answerer.answer_windows([sample], windows, [[self.budget]])[0][0]
            answer = join_answers(windows, parts)
            if on_text is not None:
                on_text(answer.text)
            return answer
        batch = answerer.processor.batch([sample], [windows[0].media], for_training=False)
        features = self._features(key, windows, batch)
        return answerer.answer_batch(batch, [[self.budget]], features=features, on_text=on_text)[0][0]

    def _features(self, key: Hashable, windows: list[Window], batch: Batch) -> Mapping[str, Features]:
        if self._encoded is None or self._encoded[0] != key:
            model = self.answerer.model
            self._encoded = key, windows, encode_media(model, batch.values, model.device)
        return self._encoded[2]
