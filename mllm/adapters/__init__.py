"""Adapters are what is trained inside the frozen LLM: here one is put in, switched off and merged.

Knows the kinds of adapters by name. Does not know encoders, compressors or budgets.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mllm.adapters import lora
from mllm.adapters.adapter_inputs import Adapter
from mllm.adapters.lora_bank import LoraBank, inject_bank, to_lora
from mllm.adapters.mome import inject_mome
from mllm.config.model import AdapterConfig, EncoderAdapterConfig, LoraBankConfig, LoraConfig, MomeConfig


def build_adapter(module: nn.Module, config: AdapterConfig | EncoderAdapterConfig, *, seed: int = 0) -> None:
    """Put an adapter into a module in place; everything else in it is frozen by this.

    Args:
        config: of the LLM's adapter, with its scales and tasks named, or of one in an encoder.
        seed: of the initial values.

    Raises:
        ValueError: what the module has no place for.
    """
    if isinstance(config, MomeConfig):
        inject_mome(
            module,
            placement=config.placement,
            num_experts=config.num_experts,
            num_shared=config.num_shared,
            top_k=config.top_k,
            bottleneck=config.bottleneck,
            renormalise=config.renormalise,
            balance_weight=config.balance_weight,
            disjoint_routers=config.disjoint_routers,
            scales=config.scales,
            seed=seed,
        )
        return
    rank, alpha, targets = config.rank, config.alpha, config.targets
    if isinstance(config, LoraBankConfig):
        inject_bank(
            module,
            variant=config.variant,
            rank=rank,
            alpha=alpha,
            targets=targets,
            scales=config.scales,
            tasks=config.tasks,
            seed=seed,
        )
        return
    dropout = config.dropout if isinstance(config, LoraConfig) else 0.0
    lora.inject(module, rank=rank, alpha=alpha, targets=targets, dropout=dropout, seed=seed)


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
