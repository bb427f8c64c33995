"""Answers lmms-eval's requests at several budgets; the media of each request are decoded and encoded once.

Knows a model, its processor and budgets. Imports nothing of lmms-eval; does not know tasks or scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.budget import Budget, Extent
from mllm.inference.answerer import Answer, Answerer
from mllm.lmms.conversation import Generation, read_conversation, read_medium
from mllm.media import MediaLoader
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.router.choice import RequestCosts
from mllm.router.router import Router

JOIN = "+"


@dataclass(frozen=True)
class Request:
    """One request: a name for messages, how to answer it, and what makes its conversation when its turn comes."""

    name: str
    generation: Generation
    messages: Callable[[], Sequence[Mapping[str, Any]]]


def read_budget(text: object, processor: ElasticProcessor) -> Budget:
    """Reads a budget of `--model_args`, where a comma would end the argument: `image=64+audio=/4`.

    Raises:
        ValueError: none at all, one that cannot be read, a medium the model does not take, or a count that its grid of
            patches cannot give. What depends on the length of a clip or the shape of an image is found later.
    """
    if text is None or not str(text).strip():
        example = JOIN.join(f"{medium}={space.trained[0]}" for medium, space in processor.space.media.items())
        raise ValueError(f"budget is missing; give one in the model's arguments, such as budget={example}")
    budget = Budget.parse(str(text).replace(JOIN, ","))
    for medium, amount in budget.amounts.items():
        if medium not in processor.space.media:
            raise ValueError(
                f"budget {str(text)!r} names {medium}; this model takes {', '.join(processor.space.media)}"
            )
        facts = processor.facts[medium]
        if facts.grid is not None and facts.max_patches is None:
            processor.space.media[medium].count(amount, Extent(medium, grid=facts.grid))
    processor.space.check(budget)
    return budget


@dataclass
class BudgetedAnswers:
    """Answers requests with one model at several budgets.

    Args:
        model: in eval mode, on the device it is to run on.
        processor: the one that belongs to it.
        budgets: every request is answered at each of them, in one batch.
        batch_size: requests of one batch; its rows are that times the number of budgets.
        loader: reads the files that requests name.
        router: chooses where a budget says `auto`.
        request_costs: what requests take in other units than tokens.
    """

    model: ElasticForConditionalGeneration = field(repr=False)
    processor: ElasticProcessor = field(repr=False)
    budgets: Sequence[Budget]
    batch_size: int = 1
    loader: MediaLoader = field(default_factory=lambda: MediaLoader(gray=True))
    router: Router | None = None
    request_costs: RequestCosts | None = None

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], object]) -> list[list[Answer]]:
        """Answers requests, those that are decoded alike together.

        Args:
            requests: in any order.
            progress: called with how many were answered, after every batch.

        Returns:
            Per request, one answer per budget.

        Raises:
            MediaError, ValueError: a request that cannot be answered, or not at one of the budgets; it is named.
        """
        numbers_of: dict[Generation, list[int]] = {}
        for number, request in enumerate(requests):
            numbers_of.setdefault(request.generation, []).append(number)
        answers: dict[int, list[Answer]] = {}
        for generation, numbers in numbers_of.items():
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                batch = [requests[number] for number in chosen]
                answers |= zip(chosen, self._answer_batch(batch, generation), strict=True)
                progress(len(chosen))
        return [answers[number] for number in range(len(requests))]

    def _answer_batch(self, requests: Sequence[Request], generation: Generation) -> list[list[Answer]]:
        samples, media = [], []
        for request in requests:
            sample, sources = read_conversation(request.name, request.messages(), separator=self.processor.separator)
            samples.append(sample)
            media.append([self._load(medium, source, request.name) for medium, source in sources])
        batch = self.processor.batch(samples, media, for_training=False)
        answerer = Answerer(
            self.model,
            self.processor,
            generation.decoding,
            router=self.router,
            request_costs=self.request_costs,
        )
        by_budget = answerer.answer_batch(batch, [[budget] * len(samples) for budget in self.budgets])
        return [list(answers) for answers in zip(*by_budget, strict=True)]

    def _load(self, medium: str, source: Any, name: str) -> LoadedMedia:
        try:
            raw = read_medium(medium, source, self.loader)
            return self.processor.transform(medium, raw, budgets=self.budgets)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
