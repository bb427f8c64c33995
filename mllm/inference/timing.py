"""Measures how long the phases of one `generate` take.

Knows a model and when its LLM is called. Does not know requests, prompts or answers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise

import torch

from mllm.model.modeling import ElasticForConditionalGeneration


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one `generate`: media to soft tokens, the prompts' pass through the LLM, the tokens after it.

    Where rows share their beginning, its pass and that of the questions behind it are both the prompts' pass.
    """

    encoder_ms: float
    prefill_ms: float
    decode_ms: float


PHASES = tuple(phase.name for phase in fields(Timing))


def stopped(device: torch.device) -> Callable[[], float]:
    """Return a function that tells the milliseconds since it was called last; the host waits for the device."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        before, last = last, time.perf_counter()
        return 1000 * (last - before)

    return lap


class Watch:
    """Marks of one `generate`: its start, the LLM's first call, the end of its last call for the prompts, its end."""

    def __init__(self, device: torch.device, active: bool, num_prefills: int) -> None:
        self.device = device
        self.active = active
        self.calls_left = num_prefills
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Keeps the first time a name is marked."""
        if name not in self.marks:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self.marks[name] = time.perf_counter()

    def count_call(self) -> None:
        """Counts a call of the LLM that has ended."""
        self.calls_left -= 1
        if self.calls_left == 0:
            self.mark("prefilled")

    def timing(self) -> Timing | None:
        """Returns the three phases, once everything is marked."""
        if not self.active:
            return None
        times = [self.marks[name] for name in ("start", "embedded", "prefilled", "end")]
        return Timing(*(1000 * (after - before) for before, after in pairwise(times)))


@contextmanager
def stopwatch(model: ElasticForConditionalGeneration, active: bool, num_prefills: int) -> Iterator[Watch]:
    """Watches the LLM from outside, so that what is timed is what runs.

    Args:
        active: on a GPU, measuring makes the host wait at each mark.
        num_prefills: calls of the LLM that read the prompts.
    """
    watch = Watch(model.device, active, num_prefills)
    if not active:
        yield watch
        return
    llm = model.get_decoder()
    hooks = [
        llm.register_forward_pre_hook(lambda *_: watch.mark("embedded")),
        llm.register_forward_hook(lambda *_: watch.count_call()),
    ]
    try:
        watch.mark("start")
        yield watch
        watch.mark("end")
    finally:
        for hook in hooks:
            hook.remove()
