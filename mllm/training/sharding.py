"""Gathers what trains and its moments whole from the shards of DeepSpeed ZeRO, and puts them back.

Knows DeepSpeed's engine. Does not know files or what a parameter is for.

Everything is gathered to the full parameters by name, so a checkpoint does not depend on the ZeRO stage or on the
number of processes. DeepSpeed's own checkpoints are pickles and are neither written nor read.
Every function here is a collective: all processes call it, with the same parameters in the same order.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm.training.optimization import check_names, check_shapes, join_moment, split_moments

_MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_trainables(engine: Any) -> dict[str, Tensor]:
    """Gather the float32 master values of what trains, whole, on the CPU.

    Raises:
        ValueError: a parameter that came back empty; it is named.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: dict[str, Tensor] = {}
    for name, parameter in _trained(engine).items():
        value = safe_get_full_fp32_param(parameter)
        if value is None or value.numel() == 0:
            raise ValueError(f"DeepSpeed gave no value for {name}; nothing was saved")
        gathered[name] = value.detach().reshape(_shape(parameter)).cpu().contiguous()
    return gathered


def gather_moments(engine: Any) -> dict[str, Tensor]:
    """Gather AdamW's moments and step count of every trained parameter, whole, on the CPU."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(iter(_adam(engine).state.values()))["step"]
    gathered: dict[str, Tensor] = {}
    for name, parameter in _trained(engine).items():
        for moment in _MOMENTS:
            value = safe_get_full_optimizer_state(parameter, moment)
            if value is None:
                raise ValueError(f"DeepSpeed gave no {moment} for {name}; nothing was saved")
            gathered[join_moment(moment, name)] = value.detach().reshape(_shape(parameter)).cpu().contiguous()
        gathered[join_moment("step", name)] = torch.as_tensor(step, dtype=torch.float32).cpu().clone()
    return gathered


def check_sharded_gradients(engine: Any, step: int) -> None:
    """Refuse a gradient that is not finite, once the engine has stepped, or has skipped the step because of it.

    DeepSpeed itself would skip every such step without a word, and with bfloat16 take the step. With float16 a few
    skipped steps are how it looks for a scale of the loss, and are left to it.

    Raises:
        FloatingPointError: on every process alike; the checkpoints are still those before the step.
    """
    zero, norm = engine.optimizer, engine.get_global_grad_norm()
    is_skipped = bool(getattr(zero, "overflow", False))
    if engine.fp16_enabled() or not (is_skipped or (norm is not None and not 0 <= float(norm) < math.inf)):
        return
    raise FloatingPointError(
        f"the gradient of step {step} is not finite; no checkpoint holds anything of it. Lower train.learning_rate, or "
        "look at the samples of this step"
    )


def scatter(engine: Any, trainables: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """Put trainables and moments into an engine that has not stepped yet.

    Raises:
        ValueError: names or shapes that are not those of the model, or an optimizer other than torch's AdamW.
    """
    parameters, by_name = _trained(engine), split_moments(moments)
    check_names(list(parameters), trainables)
    check_names(list(parameters), by_name)
    for name, parameter in parameters.items():
        check_shapes(name, {"value": trainables[name], **by_name[name]}, _shape(parameter))
        if set(by_name[name]) != {*_MOMENTS, "step"}:
            raise ValueError(f"the optimizer state of {name} is {sorted(by_name[name])}, not that of AdamW")
    zero, adam = engine.optimizer, _adam(engine)
    step = next(iter(by_name.values()))["step"]
    for flat in _flat_partitions(zero):
        adam.state[flat] = {"step": step.clone(), **{moment: torch.zeros_like(flat) for moment in _MOMENTS}}
    put = _put_stage3 if hasattr(zero, "fp32_partitioned_groups_flat") else _put_stage2
    for name, parameter in parameters.items():
        put(zero, adam, parameter, trainables[name], by_name[name])


def _put_stage2(zero: Any, adam: Any, parameter: Any, value: Tensor, moments: Mapping[str, Tensor]) -> None:
    """Copy to where every process holds the whole parameter, and a piece of its group's flat float32 master."""
    parameter.data.copy_(value)
    mapping = parameter._hp_mapping
    if mapping is None:  # this process's piece of the group holds nothing of this parameter
        return
    source, target = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    for piece_of, whole in ((flat.data, value), *((adam.state[flat][m], moments[m]) for m in _MOMENTS)):
        piece = whole.flatten().narrow(0, source.start, source.numel)
        piece_of.narrow(0, target.start, target.numel).copy_(piece)


def _put_stage3(zero: Any, adam: Any, parameter: Any, value: Tensor, moments: Mapping[str, Tensor]) -> None:
    """Copy to where every process holds an equal piece of the parameter, the last one padded."""
    from deepspeed import zero as zero_api
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    with zero_api.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, _piece(parameter, value))
    for moment in _MOMENTS:
        safe_set_local_optimizer_state(parameter, _piece(parameter, moments[moment]), moment)


def _piece(parameter: Any, whole: Tensor) -> Tensor:
    """Cut this process's piece out of a whole tensor under ZeRO-3."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = torch.zeros(size * torch.distributed.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded.narrow(0, size * rank, size).to(parameter.ds_tensor.device)


def _trained(engine: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _adam(engine: Any) -> torch.optim.Optimizer:
    adam = engine.optimizer.optimizer
    if not isinstance(adam, torch.optim.AdamW):
        raise ValueError(
            f"DeepSpeed runs {type(adam).__name__}; leave the optimizer out of its config, so that it shards AdamW"
        )
    return adam


def _flat_partitions(zero: Any) -> list[Tensor]:
    stage3 = getattr(zero, "fp32_partitioned_groups_flat", None)
    return stage3 if stage3 is not None else zero.single_partition_of_fp32_groups
