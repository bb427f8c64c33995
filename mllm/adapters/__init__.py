"""Adapters are what is trained inside the frozen LLM: here one is put in, switched off and merged.

Knows the kinds of adapters by name. Does not know encoders, compressors or budgets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mllm.adapters import lora
from mllm.adapters.adapter_inputs import Adapter
from mllm.adapters.expert_ids import REDUCED
from mllm.adapters.lora_bank import LoraBank, inject_bank, to_lora
from mllm.adapters.mome import inject_mome
from mllm.config.model import ADAPTERS as CONFIGS
from mllm.config.model import (
    AdapterConfig,
    EncoderAdapterConfig,
    GatedLoraConfig,
    LoraBankConfig,
    LoraConfig,
    MomeConfig,
)
from mllm.utils.registry import Registry


def build_adapter(module: nn.Module, config: AdapterConfig | EncoderAdapterConfig, *, seed: int = 0) -> None:
    """Put an adapter into a module in place; everything else in it is frozen by this.

    Args:
        config: of the LLM's adapter, with its scales and tasks named, or of one in an encoder.
        seed: of the initial values.

    Raises:
        ValueError: what the module has no place for.
    """
    kind = "lora" if isinstance(config, EncoderAdapterConfig) else config.kind
    BUILDERS.find(kind, key="model.adapter.kind")(module, config, seed)


def _build_lora(module: nn.Module, config: LoraConfig | EncoderAdapterConfig, seed: int) -> None:
    dropout = config.dropout if isinstance(config, LoraConfig) else 0.0
    lora.inject(module, rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=dropout, seed=seed)


def _build_bank(module: nn.Module, config: LoraBankConfig, seed: int) -> None:
    inject_bank(
        module,
        variant=config.variant,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        scales=config.scales,
        tasks=config.tasks,
        seed=seed,
    )


def _build_gated(module: nn.Module, config: GatedLoraConfig, seed: int) -> None:
    inject_bank(
        module,
        variant="ss",
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        scales=[REDUCED],
        seed=seed,
    )


def _build_mome(module: nn.Module, config: MomeConfig, seed: int) -> None:
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


Builder = Callable[[nn.Module, Any, int], None]
BUILDERS: Registry[Builder] = Registry(
    "adapter", {"lora": _build_lora, "lora_bank": _build_bank, "gated_lora": _build_gated, "mome": _build_mome}
)
"""What puts each kind into a module, given its config and a seed, by the `kind` of the config."""


def register_adapter(kind: str, build: Builder, *, config: type) -> None:
    """Add an adapter from outside, which configs then name by `model.adapter: {kind: ...}`.

    Args:
        build: puts it into a module in place, given its config and a seed; the names of its parameters begin with
            `adapter_`, which is how they are known to train, and its layers derive from `Adapter`, so that they can be
            switched off.
        config: frozen dataclass of its keys, all with defaults, `kind` among them; `weights_per_layer(linears)` counts
            the weights that every token is multiplied by in a layer, given (in, out) sizes of the layer's linear maps.

    Raises:
        ValueError: the name is taken by another adapter.
    """
    CONFIGS.check_free(kind, config)
    BUILDERS.register(kind, build)
    CONFIGS.register(kind, config)


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Switch every adapter of the module off, inside: the frozen weights answer, bit for bit."""
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
