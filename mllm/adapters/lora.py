"""Puts LoRA by PEFT into a module without wrapping it, so that the model stays the class it is.

Knows linear layers by name. Does not know which model they belong to.
Source: Hu et al., LoRA (arXiv 2106.09685).
"""

from collections.abc import Sequence

from torch import nn


def inject(
    module: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0, seed: int = 0
) -> None:
    """Adds LoRA beside the named linear layers.

    Args:
        rank: the inner size itself, not a divisor.
        alpha: the update is scaled by alpha / rank.
        targets: last parts of module names, such as `q_proj`.
        dropout: of the input of the update; packed and sequential passes are equal only at 0.
        seed: random seed of the initial values.

    Raises:
        ValueError: a rank below 1, or a target that no linear layer is named after.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(module, rank, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout)  # pyright: ignore
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)


def check_targets(module: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Refuses a rank or targets that no linear layer can be given.

    Raises:
        ValueError: a rank below 1, or a target that no linear layer is named after.
    """
    if rank < 1:
        raise ValueError(f"adapter.rank is {rank}; it must be at least 1")
    names = {name.rsplit(".", 1)[-1] for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if missing := set(targets) - names:
        raise ValueError(f"adapter.targets holds {sorted(missing)}; linear layers here are {', '.join(sorted(names))}")


def is_adapted(layer: nn.Module) -> bool:
    """Tells whether a layer is one of PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def merge(module: nn.Module) -> None:
    """Folds the updates into the weights and puts the plain layers back."""
    for name, layer in list(module.named_modules()):
        if is_adapted(layer):
            layer.merge()  # pyright: ignore[reportCallIssue]
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.get_base_layer())  # pyright: ignore[reportCallIssue]
