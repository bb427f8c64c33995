"""What is trained inside the frozen LLM: how an adapter is put in, switched off and merged.

Knows the kinds of adapters by name. Does not know encoders, compressors or budgets.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from mllm.adapters import lora
from mllm.adapters.hand_over import Adapter
from mllm.adapters.lora_bank import inject_bank, to_lora

ADAPTERS: dict[str, Callable[..., None]] = {"lora": lora.inject, "lora_bank": inject_bank}


def build_adapter(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put an adapter into a module in place; everything else in it is frozen by this.

    Args:
        settings: `{kind: lora, ...}` with the arguments of that kind's `inject`.

    Raises:
        ValueError: an unknown kind, or settings its `inject` refuses.
    """
    arguments = dict(settings)
    kind = arguments.pop("kind", "lora")
    if kind not in ADAPTERS:
        raise ValueError(f"adapter.kind is {kind!r}; allowed: {', '.join(ADAPTERS)}")
    ADAPTERS[kind](module, **arguments)


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Inside, every adapter of the module is off: the frozen weights answer, bit for bit."""
    layers = [layer for layer in module.modules() if isinstance(layer, Adapter) or lora.is_adapted(layer)]
    for layer in layers:
        layer.enable_adapters(False)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # pyright: ignore[reportCallIssue]


def merge_adapters(module: nn.Module) -> None:
    """Fold every adapter into the weights it stands beside and take it out, in place."""
    lora.merge(module)
