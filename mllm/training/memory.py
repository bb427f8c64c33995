"""Counts the memory that a model takes while it trains, whatever the batch, and what a device has free.

Knows parameters and devices. Does not know batches; what those take is measured by a dry run.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelMemory:
    """Counts the bytes that a model takes while it trains, whatever the batch.

    Args:
        weights: of all parameters and buffers.
        gradients: of what trains.
        moments: AdamW's, two numbers in float32 for each that trains.
    """

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """Sum all of it."""
        return self.weights + self.gradients + self.moments

    def __str__(self) -> str:
        return (
            f"{shown_bytes(self.total)} (weights {shown_bytes(self.weights)}, gradients {shown_bytes(self.gradients)}, "
            f"moments {shown_bytes(self.moments)})"
        )


def memory_of(model: nn.Module) -> ModelMemory:
    """Count what the weights of a model, its gradients and AdamW's moments take."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return ModelMemory(
        weights=sum(map(_num_bytes, _tensors(model))),
        gradients=sum(map(_num_bytes, trained)),
        moments=sum(2 * 4 * parameter.numel() for parameter in trained),
    )


def tell_memory(model: nn.Module, device: torch.device) -> None:
    """Log what a model will take on the device it trains on, and warn where more of that is to come than is free.

    What a micro-batch keeps for its backward pass comes on top.
    """
    memory, free = memory_of(model), free_bytes(device)
    logger.info("memory whatever the batch: %s; free: %s", memory, shown_bytes(free))
    there = [_num_bytes(tensor) for tensor in _tensors(model) if tensor.device.type == device.type]
    still_needed = memory.total - sum(there)
    if still_needed > free:
        logger.warning(
            "this run takes %s more before its first micro-batch, and %s has %s free; train less of the model, use a "
            "smaller model.dtype, or DeepSpeed",
            shown_bytes(still_needed),
            device,
            shown_bytes(free),
        )


def free_bytes(device: torch.device) -> int:
    """Return how many bytes are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def shown_bytes(num_bytes: int) -> str:
    """Write bytes as people compare them."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _tensors(model: nn.Module) -> list[Tensor]:
    """List parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def _num_bytes(tensor: Tensor) -> int:
    """Count the bytes of a tensor, or of this process's shard of it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.numel() * tensor.element_size()
