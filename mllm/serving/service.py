"""Leads requests through a server: prepared on threads, answered by the model's thread, awaited by the front.

Knows asyncio, the preparer and the scheduler. Does not know HTTP or the forms of requests.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

from mllm.budget import TokenCount
from mllm.inference.windows import join_transcripts
from mllm.media import MediaLoader
from mllm.serving.answering import AnswerRules, AnswerRun, Ending
from mllm.serving.budgets import BudgetPolicy, amounts_of
from mllm.serving.decoders import Cancelled
from mllm.serving.errors import RequestError
from mllm.serving.metrics import Metrics
from mllm.serving.preparation import Conversation, Prepared, Preparer

Read = TypeVar("Read")
RESTARTING = RequestError(503, "the server is shutting down", code="unavailable", retry_after_seconds=5)


@dataclass(frozen=True)
class MediumUsage:
    """Holds what one medium of a request got."""

    medium: str
    budget: str
    tokens: int
    is_trained: bool


@dataclass(frozen=True)
class Usage:
    """Holds what a request took: tokens of the prompt and of all answers, and what its media got.

    `budget` is the one budget of all media, None where items of one medium differ.
    """

    prompt_tokens: int
    completion_tokens: int
    budget: str | None
    media: tuple[MediumUsage, ...]
    known_media: int


@dataclass(frozen=True)
class Choice:
    """Holds one answer."""

    text: str
    ending: Ending
    stop_text: str | None
    ids: tuple[int, ...]


class Job:
    """Holds one request that is being answered: pieces of text as they are settled, and then its answers.

    Args:
        choices: per answer, the runs that make it, one for each window of its media.
    """

    def __init__(self, choices: list[list[AnswerRun]], prepared: Prepared, policy: BudgetPolicy) -> None:
        self.choices = choices
        self._prepared = prepared
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._left = sum(map(len, choices))
        self.is_done = asyncio.Event()
        for number, runs in enumerate(choices):
            for run in runs:
                run.on_end = lambda: self._tell(self._ended)
                if len(runs) == 1 and run.rules.needs_text:
                    run.on_text = lambda piece, number=number: self._tell(self._events.put_nowait, (number, piece))

    @property
    def runs(self) -> list[AnswerRun]:
        """Return all that the model writes for it."""
        return [run for runs in self.choices for run in runs]

    def cancel(self) -> None:
        """Let the model go on without it, since nobody waits any more."""
        for run in self.runs:
            run.is_cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Yield the number of an answer and a piece of its text, until all have ended; whole where they are joined."""
        while (event := await self._events.get()) is not None:
            yield event
        for number, runs in enumerate(self.choices):
            if len(runs) > 1:
                yield number, self.answers()[number].text

    def answers(self) -> list[Choice]:
        """Return all answers, once it is done.

        Raises:
            RequestError: 500, the model failed.
        """
        return [self._choice(runs) for runs in self.choices]

    def _choice(self, runs: list[AnswerRun]) -> Choice:
        if any(run.ending == "failed" for run in runs):
            raise RequestError(500, "the model failed to answer; the server's log says why", code="internal_error")
        overlaps = [before.prompt.stop - after.prompt.start for before, after in pairwise(runs)]
        text = runs[0].text
        if len(runs) > 1:
            text = join_transcripts([run.text for run in runs], max(overlaps, default=0.0))
        ending: Ending = "stop"
        for run in runs:
            if ending == "stop" and run.ending is not None:
                ending = run.ending
        return Choice(text, ending, runs[0].stop_text, tuple(token for run in runs for token in run.ids))

    def seconds(self, loader: MediaLoader) -> float:
        """Return the length of its audio, or of its video where there is none."""
        last = self._prepared.rows[-1]
        if last.stop:
            return last.stop
        lengths = {item.loaded.medium: item.loaded.raw_length for item in last.items}
        if "audio" in lengths:
            return lengths["audio"] / loader.sample_rate_hz
        return lengths["video"] / (loader.frames_per_second or 25.0)

    def usage(self) -> Usage:
        """Count what it took so far."""
        media: list[MediumUsage] = []
        for prompt in self._prepared.rows:
            media += [
                self._medium(item.loaded.medium, count)
                for item, count in zip(prompt.items, prompt.row.counted, strict=True)
            ]
        names = [item.loaded.medium for prompt in self._prepared.rows for item in prompt.items]
        counts = [count for prompt in self._prepared.rows for count in prompt.row.counted]
        return Usage(
            prompt_tokens=sum(prompt.num_prompt_tokens for prompt in self._prepared.rows),
            completion_tokens=sum(len(run.ids) for run in self.runs),
            budget=amounts_of(names, counts),
            media=tuple(media),
            known_media=self._prepared.num_known_media,
        )

    def _medium(self, medium: str, count: TokenCount) -> MediumUsage:
        is_trained = self._policy.space.media[medium].is_trained_count(count)
        return MediumUsage(medium, amounts_of([medium], [count]) or "", count.tokens, is_trained)

    def _ended(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._events.put_nowait(None)
            self.is_done.set()

    def _tell(self, what: Callable[..., object], *values: object) -> None:
        """Call something on the front's thread, from the model's."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what, *values)


class AnswerQueue(Protocol):
    """Writes answers, with a model of ours (`scheduler.py`) or another engine (`vllm_scheduler.py`)."""

    @property
    def is_alive(self) -> bool: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    def start(self) -> None: ...

    def submit(self, runs: Sequence[AnswerRun]) -> None: ...

    def close(self) -> None: ...


class Service:
    """Answers the requests of one server.

    Args:
        num_threads: that read and prepare requests.
    """

    def __init__(self, preparer: Preparer, scheduler: AnswerQueue, metrics: Metrics, *, num_threads: int) -> None:
        self.preparer = preparer
        self.scheduler = scheduler
        self.metrics = metrics
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
        self._num_in_preparation = 0

    @property
    def num_in_preparation(self) -> int:
        """Count the requests that are being read and prepared."""
        return self._num_in_preparation

    async def read(self, what: Callable[[Callable[[], bool]], Read]) -> Read:
        """Do a part of a request's preparation on a thread; it is given a question: whether nobody waits any more.

        Raises:
            RequestError: what it raises, or 503 where the server is shutting down.
        """
        left = False

        def is_left() -> bool:
            return left

        self._num_in_preparation += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, what, is_left)
        except Cancelled:
            raise RESTARTING from None
        except asyncio.CancelledError:
            left = True
            raise
        finally:
            self._num_in_preparation -= 1

    async def begin(self, conversation: Conversation, rules: AnswerRules, *, num_choices: int = 1) -> Job:
        """Prepare a request and queue it.

        Raises:
            RequestError: 400, what is wrong with it; 503, the server is shutting down.
        """
        prepared = await self.read(lambda is_left: self.preparer.prepare(conversation, is_left))
        rules = self._fitting(rules, prepared)
        choices = [
            [AnswerRun(row, replace(rules, seed=rules.seed + number)) for row in prepared.rows]
            for number in range(num_choices)
        ]
        job = Job(choices, prepared, self.preparer.policy)
        start = time.perf_counter()
        job.runs[0].on_first_token = lambda: self.metrics.first_token.observe(time.perf_counter() - start)
        if not self.scheduler.is_alive:
            raise RESTARTING
        self.scheduler.submit(job.runs)
        return job

    def _fitting(self, rules: AnswerRules, prepared: Prepared) -> AnswerRules:
        """Make rules whose answer fits behind the prompt in what the LLM reads."""
        most = self.preparer.processor.context_tokens
        if most is None:
            return rules
        left = most - max(row.num_prompt_tokens for row in prepared.rows)
        if left < 1:
            raise RequestError(
                400,
                f"the prompt fills all {most} tokens that the LLM reads; ask for fewer soft tokens",
                param="messages",
            )
        return replace(rules, max_new_tokens=min(rules.max_new_tokens, left))

    def close(self) -> None:
        """End the threads; requests that are not answered yet fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.scheduler.close()
