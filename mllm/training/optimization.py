"""Groups what trains for the optimizer, checks its gradients at every step, and names the optimizer's state.

Knows parameters by name. Does not know files; DeepSpeed's shards are in `sharding.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.model.trainables import NEW_TOKENS, part_of

# One entry per parameter and moment: `<moment>|<parameter name>`.
_SEPARATOR = "|"


def named_groups(
    model: nn.Module, *, learning_rate: float, part_learning_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Group what trains for the optimizer, by learning rate and weight decay.

    Returns:
        Groups `{names, params, lr, weight_decay}`. Matrices decay; vectors (biases, norms, rows of new tokens) do not.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = part_learning_rates.get(part_of(name), learning_rate)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the shape of what it has sharded
        decay = weight_decay if len(shape) > 1 and name != NEW_TOKENS else 0.0
        group = groups.setdefault((rate, decay), {"names": [], "params": [], "lr": rate, "weight_decay": decay})
        group["names"].append(name)
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def check_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    """Give every parameter a gradient and refuse one that is not finite; call it just before the optimizer.

    A parameter that nothing in the batch reached has gradient 0, as it has where several processes average theirs:
    so a run does the same on one process and on many.

    Raises:
        FloatingPointError: an infinite gradient or one that is no number; the weights are still those before the step.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not torch.isfinite(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])):
        raise FloatingPointError(
            f"the gradient of step {step} is not finite; nothing was updated. Lower train.learning_rate, or look at "
            "the samples of this step"
        )


def moments_of(optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Name the tensors of the optimizer's state, on the CPU.

    Args:
        names: of the parameters, by group in the optimizer's order.
    """
    tensors: dict[str, Tensor] = {}
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        for name, parameter in zip(group_names, group["params"], strict=True):
            for moment, value in optimizer.state[parameter].items():
                tensors[f"{moment}{_SEPARATOR}{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def set_moments(
    optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]
) -> None:
    """Put the state that `moments_of` gave back into an optimizer of the same parameters.

    Raises:
        ValueError: the state of another set of parameters, or of another shape; the names are given.
    """
    by_name = split_moments(tensors)
    flat = [name for group_names in names for name in group_names]
    check_names(flat, by_name)
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(flat, parameters, strict=True):
        check_shapes(name, by_name[name], tuple(parameter.shape))
    state["state"] = {index: dict(by_name[name]) for index, name in enumerate(flat)}
    optimizer.load_state_dict(state)


def split_moments(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort moments by parameter name."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition(_SEPARATOR)
        by_name.setdefault(name, {})[moment] = value
    return by_name


def join_moment(moment: str, name: str) -> str:
    """Name one moment of one parameter in a file."""
    return f"{moment}{_SEPARATOR}{name}"


def check_names(expected: Sequence[str], present: Mapping[str, Any]) -> None:
    """Refuse an optimizer state that is not exactly that of the expected parameters."""
    problems = [f"missing {name}" for name in sorted(set(expected) - set(present))]
    problems += [f"unexpected {name}" for name in sorted(set(present) - set(expected))]
    if problems:
        raise ValueError(f"the optimizer state does not fit what trains: {'; '.join(problems)}")


def check_shapes(name: str, moments: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Refuse moments that are not of their parameter's shape; a count of steps has no shape."""
    for moment, value in moments.items():
        if value.dim() and tuple(value.shape) != shape:
            raise ValueError(f"the optimizer's {moment} of {name} has shape {tuple(value.shape)}, expected {shape}")
