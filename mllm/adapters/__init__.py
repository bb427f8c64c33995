"""What is trained inside the frozen LLM: how an adapter is put in, switched off and merged.

Knows the kinds of adapters by name. Does not know encoders, compressors or budgets.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from mllm.adapters import lora
from mllm.adapters.adapter_inputs import Adapter
from mllm.adapters.lora_bank import LoraBank, inject_bank, to_lora
from mllm.adapters.mome import inject_mome

ADAPTERS: dict[str, Callable[..., None]] = {"lora": lora.inject, "lora_bank": inject_bank, "mome": inject_mome}


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


def select_experts(module: nn.Module, *, scale_id: int | None, task_id: int | None) -> None:
    """Keep of every bank only what one scale and task use, as a plain LoRA, in place; nothing where there is none.

    Raises:
        ValueError: ids that name no expert.
    """
    if any(isinstance(layer, LoraBank) for layer in module.modules()):
        to_lora(module, scale_id=scale_id, task_id=task_id)


def merge_adapters(module: nn.Module) -> None:
    """Fold every adapter into the weights it stands beside and take it out, in place.

    Raises:
        ValueError: an adapter that depends on the rows, and so is no change of the weights.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, Adapter):
            raise ValueError(f"{name} ({type(layer).__name__}) depends on its rows and cannot be merged")
    lora.merge(module)
