"""Training over many budgets: `train` does all of it, the other names are its pieces, as a notebook uses them."""

from importlib import import_module
from typing import Any

# Loaded when used: a process that encodes features must hide broken packages before any of these is imported.
_LAZY = {
    "ElasticTrainer": "mllm.training.trainer",
    "build_model": "mllm.training.run",
    "build_sampler": "mllm.training.pipeline.dataset",
    "build_trainer": "mllm.training.run",
    "launch": "mllm.training.run",
    "load_dataset": "mllm.training.pipeline.dataset",
    "read_config": "mllm.training.run",
    "save": "mllm.training.run",
    "train": "mllm.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mllm.training' has no attribute {name!r}; it has {', '.join(_LAZY)}")
    from mllm.utils.broken_packages import hide_broken_packages

    hide_broken_packages()
    return getattr(import_module(_LAZY[name]), name)
