"""mllm: multimodal LLMs with an elastic token budget.

Importing this is cheap: nothing of torch or transformers is loaded until it is used. From then on transformers' Auto
classes know the model type `elastic`.
"""

from importlib import import_module
from typing import Any

from mllm import registration
from mllm.budget import Budget, Space

__version__ = "0.1.0"

_LAZY = {
    "Answerer": "mllm.generation",
    "ElasticConfig": "mllm.model.configuration",
    "ElasticForConditionalGeneration": "mllm.model.modeling",
    "ElasticProcessor": "mllm.processing.processor",
    "export": "mllm.loading",
    "load": "mllm.loading",
    "register": "mllm.registration",
}

__all__ = ["Budget", "Space", "__version__", *_LAZY]

registration.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_LAZY[name]), name)
