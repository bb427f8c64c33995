"""mllm: multimodal LLMs with an elastic token budget.

Importing this is cheap and changes nothing: torch and transformers are loaded when something is used. `mllm.register()`
makes transformers' Auto classes know the model type `elastic`.
"""

from importlib import import_module
from typing import Any

from mllm.budget import Budget, Space

__version__ = "0.1.0"

_LAZY = {
    "Answerer": "mllm.inference.answerer",
    "ElasticConfig": "mllm.model.configuration",
    "ElasticForConditionalGeneration": "mllm.model.modeling",
    "ElasticProcessor": "mllm.processing.processor",
    "export": "mllm.checkpoints.export",
    "load": "mllm.checkpoints.load",
    "load_router": "mllm.router.router",
    "register": "mllm.checkpoints.auto_classes",
    "train": "mllm.commands.train",
}

__all__ = ["Budget", "Space", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    from mllm.utils.broken_packages import hide_broken_packages

    hide_broken_packages()  # what is named above imports transformers, which fails with broken packages
    return getattr(import_module(_LAZY[name]), name)
