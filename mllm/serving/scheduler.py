"""Queues answers before the model, whose thread writes together what waits.

Knows answers and the engine. Does not know HTTP, media or budgets.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mllm.serving.answering import AnswerRun
from mllm.serving.engine import Engine
from mllm.serving.limits import Batching

LOGGER = logging.getLogger(__name__)
IDLE_SECONDS = 0.5
ROWS_WORTH_LEAVING = 4
"""A smaller batch is not put together anew for those of its answers that have ended."""


class Scheduler:
    """Lets an engine write answers, on a thread of its own.

    Args:
        num_in_preparation: how many requests are about to come.
        on_batch: called after every batch with its number of rows and its seconds.
    """

    def __init__(
        self,
        engine: Engine,
        batching: Batching,
        *,
        num_in_preparation: Callable[[], int] = lambda: 0,
        on_batch: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.engine = engine
        self.batching = batching
        self._num_in_preparation = num_in_preparation
        self._on_batch = on_batch
        self._waiting: deque[AnswerRun] = deque()
        self._going_on: list[AnswerRun] = []
        self._wake = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Tell whether answers are being written, or would be."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def num_waiting(self) -> int:
        """Count the answers that the model has not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Count the answers that are being written."""
        return len(self._going_on)

    def submit(self, runs: Sequence[AnswerRun]) -> None:
        """Queue answers; they are told themselves when they have ended."""
        with self._wake:
            is_closed = self._is_closed
            self._waiting += [] if is_closed else runs
            self._wake.notify()
        if is_closed:
            self._fail(runs)

    def close(self) -> None:
        """End the thread; answers that have not ended fail."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._fail([*self._going_on, *self._waiting])
        self._waiting.clear()
        self._going_on = []

    def _work(self) -> None:
        while not self._is_closed:
            self._going_on += self._next()
            if self._going_on:
                self._answer(self._going_on)
                self._going_on = [run for run in self._going_on if run.ending is None]

    def _next(self) -> list[AnswerRun]:
        """Take answers that join those that go on, in the order they came."""
        with self._wake:
            if not self._waiting and not self._going_on:
                self._wake.wait(IDLE_SECONDS)
            self._wait_for_company()
            joining: list[AnswerRun] = []
            while self._waiting and self._fits(joining, self._waiting[0]):
                run = self._waiting.popleft()
                if run.is_cancelled:
                    run.end("cancelled", self.engine.decode)
                else:
                    joining.append(run)
            return joining

    def _wait_for_company(self) -> None:
        """Where the model would begin with few answers, wait a moment for those that are about to come."""
        end = time.monotonic() + self.batching.wait_seconds
        while (
            self._waiting
            and not self._going_on
            and len(self._waiting) < self.batching.max_rows
            and self._num_in_preparation() > 0
            and (left := end - time.monotonic()) > 0
        ):
            self._wake.wait(left)

    def _fits(self, joining: Sequence[AnswerRun], run: AnswerRun) -> bool:
        together = [*self._going_on, *joining, run]
        longest = max(other.prompt.num_prompt_tokens + len(other.ids) for other in together)
        few = len(together) <= self.batching.max_rows and longest * len(together) <= self.batching.max_tokens
        return few or len(together) == 1

    def _is_interrupted(self, steps: int, going_on: int) -> bool:
        if self._is_closed:
            return True
        num_rows = len(self._going_on)
        if num_rows > ROWS_WORTH_LEAVING and 2 * going_on <= num_rows:
            return True
        has_room = going_on < self.batching.max_rows
        return bool(self._waiting) and has_room and steps >= self.batching.steps_before_joining

    def _answer(self, runs: Sequence[AnswerRun]) -> None:
        """Write answers together; where that fails, one by one, so that what is wrong with one fails it alone."""
        start = time.perf_counter()
        for run in runs:
            if run.is_cancelled:
                run.end("cancelled", self.engine.decode)
        left = [run for run in runs if run.ending is None]
        try:
            if left:
                self.engine.write(left, self._is_interrupted)
        except Exception:
            left = [run for run in left if run.ending is None]
            LOGGER.exception("%d answers could not be written together", len(left))
            if len(left) == 1:
                self._fail(left)
            for run in left if len(left) > 1 else []:
                self._answer([run])
        self._on_batch(len(left), time.perf_counter() - start)

    def _fail(self, runs: Sequence[AnswerRun]) -> None:
        for run in runs:
            run.end("failed", self.engine.decode)
