"""Times runs in turns in one process, and reads the options that all benchmarks take."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# Every benchmark imports this file, itself or by way of another, before it imports mllm, which is then that of this
# tree and not one that is installed.
sys.path.insert(0, str(Path(__file__).parent.parent))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time one run: CPU seconds of this process, or wall seconds until the GPU is done."""
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
    """Time every run, each after a `prepare` that is not timed and whose result it is given.

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


def unprepared(runs: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[Any], object]]:
    """Wrap runs that take nothing from a `prepare`, for `in_turns`."""
    return {name: lambda _, run=run: run() for name, run in runs.items()}


def middle_half(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute where a quarter, half and three quarters of the values are below."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float], *, digits: int = 3) -> str:
    """Write the median and the middle half."""
    low, middle, high = middle_half(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def milliseconds(seconds: Sequence[float], *, digits: int = 2) -> str:
    """Write the median and the middle half of seconds, in milliseconds."""
    return spread([1000 * value for value in seconds], digits=digits)


def ratio_of(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Compute the ratio of the medians."""
    return statistics.median(slow) / statistics.median(fast)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Write the ratio of the medians, and the middle half of the ratios of each turn."""
    low, _, high = middle_half([a / b for a, b in zip(slow, fast, strict=True)])
    return f"{ratio_of(slow, fast):.2f} ({low:.2f}-{high:.2f})"


def options(
    doc: str | None,
    repeats: int | None,
    *,
    with_device: bool = False,
    folders: Mapping[str, str] | None = None,
    **counts: int | Sequence[int],
) -> argparse.Namespace:
    """Read what benchmarks take on the command line, and set the number of threads.

    Args:
        repeats: times that count, by default, at least 2; None where nothing is timed, and the option is ignored.
        folders: options that name a folder, None when left out, with their help.
        counts: further whole numbers, or lists of them, by name, with their defaults.
        with_device: also take a device and a dtype.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="append the outcomes to this file, as lines of JSON")
    parser.add_argument("--repeats", type=int, default=repeats, help="ignored" if repeats is None else None)
    for name, default in {"threads": 1, **counts}.items():
        shape: dict[str, Any] = {} if isinstance(default, int) else {"nargs": "+"}
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, **shape)
    for name, text in (folders or {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="FOLDER", help=text)
    if with_device:
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    if arguments.repeats is not None and arguments.repeats < 2:
        parser.error(f"--repeats is {arguments.repeats}; a middle half needs at least 2")
    torch.set_num_threads(arguments.threads)
    return arguments
