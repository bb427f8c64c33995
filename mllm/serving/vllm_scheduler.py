"""Hands answers to vLLM's engine in place of a model: the engine batches them, and runs in processes of its own.

Knows answers and the engine. Does not know HTTP or budgets: media come counted, so a cap over all of them is met here
as everywhere, which the engine's own server could not do.
"""

import asyncio
import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Collection, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from mllm.checkpoints.expert_folders import ExpertFolders
from mllm.processing.processor import ElasticProcessor
from mllm.serving.answering import AnswerRules, AnswerRun, decoder_of
from mllm.vllm_plugin.engine_options import EngineOptions, environment
from mllm.vllm_plugin.prompts import prompt_of

LOGGER = logging.getLogger(__name__)
SWEEP_SECONDS = 0.1
"""How often answers are looked for that nobody waits for any more."""
Result = TypeVar("Result")


class VllmScheduler:
    """Lets vLLM write answers; its loop runs on a thread of its own.

    Args:
        options: how the engine is started.
        processor: of the export.
        end_ids: tokens that end an answer.

    Raises:
        Exception: what the engine fails with when it starts.
    """

    def __init__(self, options: EngineOptions, processor: ElasticProcessor, end_ids: Collection[int]) -> None:
        self.decode = decoder_of(processor.tokenizer)
        self._processor = processor
        self._end_ids = frozenset(end_ids)
        self._loras = {} if options.experts is None else lora_requests(options.experts)
        self._experts = options.experts
        self._tasks: dict[AnswerRun, asyncio.Task[None]] = {}
        self._sweepers: list[asyncio.Task[None]] = []
        self._numbers = itertools.count()
        self._is_closed = False
        os.environ.update(environment(options.threads))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            arguments = options.arguments(tuple(processor.placeholder_ids), processor.context_tokens)
            self._llm = self._wait_for(_started(arguments))
        except BaseException:
            # The loop may be in the middle of starting them, and would wait for ever; they end what they have started.
            for process in multiprocessing.active_children():
                process.terminate()
            raise

    def start(self) -> None:
        """Begin to look for answers that nobody waits for."""
        self._loop.call_soon_threadsafe(lambda: self._sweepers.append(self._loop.create_task(self._sweep())))

    @property
    def is_alive(self) -> bool:
        """Whether answers are being written, or would be."""
        return not self._is_closed and not self._llm.errored

    @property
    def num_waiting(self) -> int:
        """Answers that have no token yet."""
        return sum(not run.ids for run in tuple(self._tasks))

    @property
    def num_running(self) -> int:
        """Answers that are being written."""
        return len(self._tasks) - self.num_waiting

    def submit(self, runs: Sequence[AnswerRun]) -> None:
        """Hand answers to the engine; they are told themselves when they have ended."""
        if self._is_closed:
            for run in runs:
                run.end("failed", self.decode)
            return
        self._loop.call_soon_threadsafe(self._begin, runs)

    def close(self) -> None:
        """End the engine; answers that have not ended fail."""
        if self._is_closed:
            return
        self._is_closed = True
        self._wait_for(self._shut_down())
        self._end_loop()

    def _wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _begin(self, runs: Sequence[AnswerRun]) -> None:
        for run in runs:
            if self._is_closed:
                run.end("failed", self.decode)
                continue
            task = self._loop.create_task(self._write(run))
            self._tasks[run] = task
            task.add_done_callback(lambda _, run=run: self._tasks.pop(run))

    async def _write(self, run: AnswerRun) -> None:
        """Write one answer to its end. Whatever goes wrong with it fails it alone."""
        try:
            await self._take_tokens(run)
        except asyncio.CancelledError:
            run.end("failed" if self._is_closed else "cancelled", self.decode)
            raise
        except Exception:
            LOGGER.exception("an answer could not be written")
            run.end("failed", self.decode)

    async def _take_tokens(self, run: AnswerRun) -> None:
        row, media = run.prompt.row, [item.loaded for item in run.prompt.items]
        prompt: Any = prompt_of(self._processor, row.ids, media, row.counted)
        params = sampling_params(run.rules, self._end_ids)
        # Closed where it is left early, which tells the engine.
        outputs = self._llm.generate(prompt, params, str(next(self._numbers)), lora_request=self._lora_of(run))
        async with aclosing(outputs):
            async for output in outputs:
                for token in output.outputs[0].token_ids:
                    if run.ending is None:
                        run.take(token, self._end_ids, self.decode)
                if run.ending is not None:
                    return
        raise RuntimeError(f"the engine ended an answer after {len(run.ids)} tokens, before its rules do")

    def _lora_of(self, run: AnswerRun) -> LoRARequest | None:
        """Choose the expert that a row's scale or task has."""
        if self._experts is None:
            return None
        row = run.prompt.row
        counts = [(span.extent.medium, count) for span, count in zip(row.spans, row.counted, strict=True)]
        name = self._experts.name_of(row.task, counts)
        return None if name is None else self._loras[name]

    async def _sweep(self) -> None:
        while True:
            for run, task in tuple(self._tasks.items()):
                if run.is_cancelled:
                    task.cancel()
            await asyncio.sleep(SWEEP_SECONDS)

    async def _shut_down(self) -> None:
        tasks = [*self._tasks.values(), *self._sweepers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown()


def lora_requests(experts: ExpertFolders) -> dict[str, LoRARequest]:
    """Name the LoRAs of an export as vLLM does, by the names of their experts."""
    return {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(experts.folders.items(), start=1)
    }


async def _started(arguments: dict[str, Any]) -> AsyncLLM:
    """Start the engine on the loop that is going to talk to it."""
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def sampling_params(rules: AnswerRules, end_ids: Collection[int]) -> SamplingParams:
    """Say the rules of an answer as vLLM reads them; texts that end it, and repetition, are looked for here.

    An answer that is sampled is vLLM's sample of the seed, which is another than ours.
    """
    return SamplingParams(
        temperature=rules.temperature or 0.0,
        seed=None if rules.temperature is None else rules.seed,
        max_tokens=rules.max_new_tokens,
        stop_token_ids=[] if rules.ignores_end else sorted(end_ids),
        ignore_eos=rules.ignores_end,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
