"""Puts a bank of LoRA experts beside a linear layer: a shared one, one per scale and one per task, chosen by row ids.

Knows linear layers and ids. Does not know what a scale or a task is, nor who gives a row its id.

All experts are one stacked parameter, so that every process touches all of them in every step, whatever its rows are:
the update is one product over the concatenated ranks, in which the ranks of experts a token does not use are zeroed.

Shapes: B rows, S positions, E experts, r rank, I and O the sizes of the linear layer.
Sources: Llama-MTSK (arXiv 2503.06362), Omni-AVSR (arXiv 2511.07253).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.adapters.adapter_inputs import Adapter, connect, decoder_layers
from mllm.adapters.expert_ids import kinds_of
from mllm.adapters.lora import check_targets, inject


class LoraBank(Adapter):
    """Adds to a frozen linear layer what the experts of each token give; all experts are stacked in two parameters.

    Experts stand in the order shared, scales, tasks. A token uses the shared one and those its ids name.

    Args:
        base_layer: kept as it is.
        has_shared: whether there is an expert that every token uses.
        num_scales, num_tasks: experts of each kind.
        rank: inner size of each expert.
        alpha: the update is scaled by alpha / rank.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        has_shared: bool,
        num_scales: int,
        num_tasks: int,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.has_shared, self.num_scales, self.num_tasks = has_shared, num_scales, num_tasks
        self.rank, self.scaling = rank, alpha / rank
        num_experts = int(has_shared) + num_scales + num_tasks
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, base_layer.out_features, rank, device=device))
        for expert in self.lora_A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def experts_used(self, scale_ids: Tensor | None, task_ids: Tensor | None, shape: torch.Size) -> Tensor:
        """Tells which experts each token uses.

        Args:
            scale_ids, task_ids: (B,) or (B, S); -1 uses none.
            shape: (B, S).

        Returns:
            (B, S, E) or (B, 1, E) bool.

        Raises:
            ValueError: ids that are needed and missing.
        """
        device = self.lora_A.device
        used = [torch.ones(*shape, 1, dtype=torch.bool, device=device)] if self.has_shared else []
        for name, ids, count in (("scale", scale_ids, self.num_scales), ("task", task_ids, self.num_tasks)):
            if not count:
                continue
            if ids is None:
                raise ValueError(f"the adapter has experts per {name}, but {name}_ids were not given")
            ids = ids.to(device)
            ids = ids[:, None] if ids.dim() == 1 else ids  # (B, 1) or (B, S)
            one_hot = ids[..., None] == torch.arange(count, device=device)
            used.append(one_hot.expand(*shape, count))
        return torch.cat(used, dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Adds what the experts of each token give to the linear layer: (B, S, I) -> (B, S, O)."""
        out = self.base_layer(inputs)
        if not self.is_enabled:
            return out
        used = self.experts_used(self.inputs.scale_ids, self.inputs.task_ids, inputs.shape[:-1])
        # One product over all ranks side by side, then zeros where a token does not use an expert: every expert is
        # touched in every step, as DDP and ZeRO demand, and no shape depends on the rows.
        down_RI = self.lora_A.flatten(0, 1)  # R = E * r
        up_OR = self.lora_B.transpose(0, 1).flatten(1)
        inner_BSR = functional.linear(inputs.to(down_RI.dtype), down_RI)
        inner_BSR = inner_BSR.masked_fill(~used.repeat_interleave(self.rank, dim=-1), 0.0)
        return (out + self.scaling * functional.linear(inner_BSR, up_OR)).to(out.dtype)

    def expert_indices(self, scale_id: int | None, task_id: int | None) -> list[int]:
        """Lists the experts that a token with these ids uses, by their place in the stack.

        Raises:
            ValueError: an id that is missing or beyond the experts of its kind.
        """
        indices = [0] if self.has_shared else []
        start = len(indices)
        for name, expert_id, count in (("scale", scale_id, self.num_scales), ("task", task_id, self.num_tasks)):
            if count and (expert_id is None or not 0 <= expert_id < count):
                raise ValueError(f"the adapter has {count} experts per {name}; {name} {expert_id} is none of them")
            indices += [start + expert_id] if count and expert_id is not None else []
            start += count
        return indices


def inject_bank(
    module: nn.Module,
    *,
    variant: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    scales: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Puts a bank beside the named linear layers of every decoder layer.

    Args:
        module: the LLM's decoder.
        variant: see `mllm.adapters.expert_ids.VARIANTS`.
        scales, tasks: names of the experts of each kind.
        rank, alpha, targets, seed: as those of LoRA.

    Raises:
        ValueError: an unknown variant or target, a rank below 1, names that do not go with the variant, or an LLM
            without decoder layers.
    """
    kinds = kinds_of(variant)
    check_targets(module, rank, targets)
    for kind, names in (("scale", scales), ("task", tasks)):
        if (kind in kinds) != bool(names):
            raise ValueError(f"adapter.{kind}s is {list(names)}, but variant {variant} has experts of {kinds}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in decoder_layers(module):
            linears = [
                (name, submodule)
                for name, submodule in layer.named_modules()
                if isinstance(submodule, nn.Linear) and name.rsplit(".", 1)[-1] in targets
            ]
            banks = []
            for name, linear in linears:
                bank = LoraBank(
                    linear,
                    has_shared="shared" in kinds,
                    num_scales=len(scales),
                    num_tasks=len(tasks),
                    rank=rank,
                    alpha=alpha,
                )
                layer.set_submodule(name, bank)
                banks.append(bank)
            connect(layer, banks)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_" in name)


@dataclass(frozen=True)
class PlainLora:
    """Holds a LoRA by itself: its config, and by linear layer its matrices (r, I) and (O, r)."""

    rank: int
    alpha: float
    targets: list[str]
    weights: dict[str, tuple[Tensor, Tensor]]


def lora_of(module: nn.Module, *, scale_id: int | None = None, task_id: int | None = None) -> PlainLora:
    """Copies what one scale and task use of every bank as one LoRA; exact, the ranks are concatenated.

    Raises:
        ValueError: ids that name no expert.
    """
    first = next(iter(_banks_of(module).values()))
    return _plain(module, first.expert_indices(scale_id, task_id))


def shared_lora_of(module: nn.Module) -> PlainLora | None:
    """Copies what a row without media uses, the shared expert; None where there is none."""
    return _plain(module, [0]) if next(iter(_banks_of(module).values())).has_shared else None


@torch.no_grad()
def _plain(module: nn.Module, indices: Sequence[int]) -> PlainLora:
    banks = _banks_of(module)
    first = next(iter(banks.values()))
    rank = first.rank * len(indices)
    weights = {
        name: (bank.lora_A[indices].flatten(0, 1).clone(), bank.lora_B[indices].transpose(0, 1).flatten(1).clone())
        for name, bank in banks.items()
    }
    return PlainLora(rank, first.scaling * rank, sorted({name.rsplit(".", 1)[-1] for name in banks}), weights)


def take_out_bank(module: nn.Module) -> None:
    """Puts the linear layers back in place of the banks beside them."""
    for name, bank in _banks_of(module).items():
        module.set_submodule(name, bank.base_layer)


def _banks_of(module: nn.Module) -> dict[str, LoraBank]:
    banks = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraBank)}
    assert banks
    return banks


@torch.no_grad()
def to_lora(module: nn.Module, *, scale_id: int | None = None, task_id: int | None = None) -> dict[str, object]:
    """Replaces every bank by PEFT's LoRA of what one scale and task use, in place; see `lora_of`.

    Returns:
        The config of that LoRA: kind, rank, alpha and targets.

    Raises:
        ValueError: ids that name no expert.
    """
    plain = lora_of(module, scale_id=scale_id, task_id=task_id)
    take_out_bank(module)
    inject(module, rank=plain.rank, alpha=plain.alpha, targets=plain.targets)
    for name, (down, up) in plain.weights.items():
        layer = module.get_submodule(name)
        layer.lora_A["default"].weight.copy_(down)  # pyright: ignore
        layer.lora_B["default"].weight.copy_(up)  # pyright: ignore
    return {"kind": "lora", "rank": plain.rank, "alpha": plain.alpha, "targets": plain.targets}
