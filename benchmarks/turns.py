"""Runs timed in turns in one process, for the benchmarks beside it."""

import argparse
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


def spread(values: list[float], *, digits: int = 3) -> str:
    """Median and middle half."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(slow: list[float], fast: list[float]) -> str:
    """Ratio of the medians, and the middle half of the ratios of each turn."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4, method="inclusive")
    return f"{statistics.median(slow) / statistics.median(fast):.2f} ({low:.2f}-{high:.2f})"


def options(doc: str | None, repeats: int, *, with_device: bool = False, **counts: int) -> argparse.Namespace:
    """What benchmarks take on the command line; sets the number of threads.

    Args:
        repeats: times that count, by default. counts: further whole numbers by name, with their defaults.
        with_device: also take a device and a dtype.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"repeats": repeats, "threads": 1, **counts}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    if with_device:
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given
