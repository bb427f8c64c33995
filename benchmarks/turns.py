"""Runs timed in turns in one process, for the benchmarks beside it."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """One timed run: CPU seconds of this process, or wall seconds until the GPU is done."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[Any], object]],
    repeats: int,
    device: torch.device,
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every run, each after a `prepare` that is not timed and whose result it is given.

    The order turns round each time; a first round that does not count warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            ready = prepare()
            seconds = seconds_of(lambda run=runs[name], ready=ready: run(ready), device)
            if turn:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> str:
    """Median and middle half, in seconds."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.3f} ({low:.3f}-{high:.3f})"


def ratio(slow: list[float], fast: list[float]) -> str:
    """Ratio of the medians, and the middle half of the ratios of each turn."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4, method="inclusive")
    return f"{statistics.median(slow) / statistics.median(fast):.2f} ({low:.2f}-{high:.2f})"
