"""Shards the frozen layers of the LLM over the processes by PyTorch's FSDP2; what trains stays whole on each of them.

Knows decoder layers, their parameters and devices. Does not know launchers, configs, checkpoints or DeepSpeed.

Only the frozen LLM is large here. Each of its layers is gathered for its forward and its backward pass, and lies in
pieces, one per process, at all other times. Embeddings, head, encoders and everything that trains are on every process,
and DDP averages the gradients, as it does without shards: so a step, the optimizer, a checkpoint and the finished run
are those of DDP. accelerate's own FSDP2 would put what trains in pieces too, and there is none of it on CPUs.
"""

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mllm.model.modeling import ElasticForConditionalGeneration

logger = logging.getLogger(__name__)


def mesh_of_all(device: torch.device) -> DeviceMesh:
    """Line up all processes, each of which holds a shard; every process calls this at the same time.

    They are a group of their own, since operations of one group must come in the same order on all processes. DDP sends
    gradients as they get ready, and where a process lacks a medium that may be before another layer than elsewhere.
    """
    group = torch.distributed.new_group()
    assert isinstance(group, torch.distributed.ProcessGroup)
    return DeviceMesh.from_group(group, device.type)


def shard_llm(model: ElasticForConditionalGeneration, device: torch.device, mesh: DeviceMesh) -> None:
    """Put the frozen parameters of the LLM's layers in shards, and everything else whole on the device of this process.

    Every process calls this, with the same weights, once it is known what trains and before anything is wrapped. They
    need not do so at the same time: each cuts its shards out of the whole layers it has.

    Args:
        device: of this process.
        mesh: see `mesh_of_all`.

    Raises:
        ValueError: an LLM whose layers are not to be found.
    """
    llm: Any = model.model.language_model
    if not (layers := list(getattr(llm, "layers", []))):
        raise ValueError(
            f"FSDP2 shards the layers of an LLM, and {type(llm).__name__} has none of that name; use ZeRO-3"
        )
    frozen = [parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad]
    trained = {parameter for parameter in llm.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # A common root, with nothing to shard itself, lets the next layer be gathered while one is computed. It is not the
    # LLM, of which FSDP makes another class: transformers knows by the class whose hidden states it may record.
    fully_shard(model.model, mesh=mesh, ignored_params=set(model.parameters()))
    model.to(device)  # pyright: ignore[reportArgumentType] (as in checkpoints/load.py); the shards are there already
    num_frozen = sum(parameter.numel() for parameter in frozen)
    logger.info("%s frozen parameters of the LLM are in %s shards", f"{num_frozen:,}", mesh.size())


def averaging_gradients(model: nn.Module) -> DistributedDataParallel:
    """Wrap a model of which frozen weights are in shards, so that the gradients of what trains are averaged."""
    shards = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    # DDP sends the weights of the first process to all others, and has no way to send a shard.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shards)
    return DistributedDataParallel(model)
