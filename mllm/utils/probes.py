"""Answers what `mllm doctor` asks, in a process apart, which a package may end: which modules import, which devices
there are.

Run as a file it needs nothing of this package, so that modules can be tried with and without mllm beside them.
"""

import json
import sys
from collections.abc import Iterable, Sequence

MARK = "mllm-doctor:"
"""Answers begin with this, since packages may print whatever they like on import."""


def answer(what: str, *arguments: str) -> None:
    """Answer in the process apart: one line per answer, at once, since the next import may end it."""
    for name, answer in PROBES[what](arguments):
        sys.stdout.write(f"{MARK}{json.dumps([name, answer])}\n")
        sys.stdout.flush()


def _import_each(modules: Sequence[str]) -> Iterable[tuple[str, str]]:
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:  # a package may raise anything, even SystemExit
            yield module, f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            yield module, ""


def _describe_devices(_: Sequence[str]) -> Iterable[tuple[str, str]]:
    import torch

    yield "threads", str(torch.get_num_threads())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif torch.backends.mps.is_available():
        yield "mps", "Apple GPU"
    else:
        yield "accelerator", "none; everything runs on the CPU"


PROBES = {"imports": _import_each, "devices": _describe_devices}


if __name__ == "__main__":
    if __spec__ is not None:  # run as a module of mllm: modules are then imported as mllm imports them
        from mllm.utils.broken_packages import hide_broken_packages

        hide_broken_packages()
    answer(*sys.argv[1:])
