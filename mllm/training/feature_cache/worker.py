"""Encodes one process's part of the features of a run, in a process that `build_features` starts.

Imports nothing of transformers by itself, so that a new process can hide broken packages first.
"""

import logging
import sys
from multiprocessing.sharedctypes import Synchronized

from mllm.config.run import RunConfig
from mllm.utils.broken_packages import hide_broken_packages


def encode_share(
    config: RunConfig, rank: int, num_ranks: int, done: "Synchronized[int]", total: "Synchronized[int]"
) -> None:
    """Make the features of one of several processes; writes how far it is to `done` and `total`.

    Exits with status 1 after a message on stderr where something is refused.
    """
    hide_broken_packages()
    import torch

    from mllm.training.feature_cache.building import make_features

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mllm.training").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))

    def report(num_done: int, num_samples: int) -> None:
        done.value, total.value = num_done, num_samples

    try:
        make_features(config, rank=rank, num_ranks=num_ranks, progress=report)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"process {rank}: {error}\n")
        sys.exit(1)
