"""mllm: multimodal LLMs with an elastic token budget.

Importing this is cheap: nothing of torch or transformers is loaded until it is used. From then on transformers' Auto
classes know the model type `elastic`.
"""

from importlib import import_module
from typing import Any

from mllm.budget import Budget, Space
from mllm.checkpoints import auto_classes

__version__ = "0.1.0"

_LAZY = {
    "Answerer": "mllm.inference.answerer",
    "ElasticConfig": "mllm.model.configuration",
    "ElasticForConditionalGeneration": "mllm.model.modeling",
    "ElasticProcessor": "mllm.processing.processor",
    "export": "mllm.checkpoints.load",
    "load": "mllm.checkpoints.load",
    "register": "mllm.checkpoints.auto_classes",
}

__all__ = ["Budget", "Space", "__version__", *_LAZY]

auto_classes.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_LAZY[name]), name)
