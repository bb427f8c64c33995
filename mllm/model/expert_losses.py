"""Collects what experts report in a forward pass: losses, by row, that even out their use, and the losses' weights.

Knows the adapter's inputs, compressors, placeholders and how rows are packed. Does not know the LLM.

Shapes: B rows, S positions.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mllm.adapters.adapter_inputs import KINDS_WITH_INPUTS, TOKEN_KINDS, AdapterInputs, Collector
from mllm.compressors import MixtureProjector, ProjectorBank
from mllm.compressors.moe_projector import routing_losses
from mllm.config.medium import MoeConfig
from mllm.config.model import MomeConfig
from mllm.model.configuration import ElasticConfig
from mllm.model.splice import is_newline, merge, place_in_order
from mllm.packing.plan import SegmentPlan


def auxiliary_weights(config: ElasticConfig) -> dict[str, float]:
    """List by name what each of a model's auxiliary losses is multiplied by; see `ElasticOutput`."""
    weights = {"balance": config.adapter.balance_weight if isinstance(config.adapter, MomeConfig) else 0.0}
    for medium, block in config.encoded_media.items():
        if isinstance(block.projector, MoeConfig):
            weights[f"{medium}_balance"] = block.projector.balance_weight
            weights[f"{medium}_z"] = block.projector.z_weight
    return weights


def adapter_inputs_of(
    config: ElasticConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    scale_ids: Tensor | None,
    task_ids: Tensor | None,
    with_report: bool,
    plan: SegmentPlan | None = None,
) -> AdapterInputs | None:
    """Gather what the adapter needs to know of the rows; None where it asks for nothing.

    Args:
        input_ids: (B, S). attention_mask: (B, S). scale_ids, task_ids: (B,) or (B, S).
        with_report: let it report what its experts did.
        plan: of packed rows.

    Raises:
        ValueError: ids for an adapter that has no experts.
    """
    kind = "lora" if config.adapter is None else config.adapter.kind
    if kind not in KINDS_WITH_INPUTS:
        if scale_ids is not None or task_ids is not None:
            raise ValueError(f"scale_ids and task_ids go with {' or '.join(KINDS_WITH_INPUTS)}, not {kind}")
        return None
    if kind != "mome" or input_ids is None or not with_report:
        return AdapterInputs(scale_ids, task_ids)
    kinds = torch.zeros_like(input_ids)
    for medium, placeholder in (config.placeholder_ids or {}).items():
        kinds = kinds.masked_fill(input_ids == placeholder, TOKEN_KINDS.index(medium))
    if attention_mask is not None:
        kinds = kinds.masked_fill(attention_mask == 0, -1)
    return AdapterInputs(scale_ids, task_ids, kinds, Collector(), plan)


def routing_losses_of(
    compressors: nn.ModuleDict,
    placeholder_ids: Mapping[str, int],
    input_ids: Tensor | None,
    media: Mapping[str, Tensor | None],
    plan: SegmentPlan | None,
) -> dict[str, Tensor]:
    """Compute balance and size of the logits of every mixture of projectors, (B,) by name; takes what they left behind.

    Args:
        compressors: by medium.
        input_ids: (B, S).
        media: the media arguments of the model's `forward` by name.
        plan: of packed rows; B and S are then those of the rows themselves in what is returned.
    """
    losses = {}
    for medium, compressor in compressors.items():
        bank = getattr(compressor, "projectors", None)
        num_tokens = media.get(f"num_{medium}_tokens")
        if not isinstance(bank, ProjectorBank) or (routing := bank.take_routing()) is None:
            continue
        if num_tokens is None or input_ids is None:
            continue  # it was only run to touch its parameters
        is_token = input_ids == placeholder_ids[medium]
        # Routing is by span; losses are by row, so it goes where the soft tokens themselves went.
        spread = routing.new_zeros(*input_ids.shape, routing.shape[-1])
        layout = media.get(f"{medium}_layout") if plan is None else plan.layouts.get(medium)
        if layout is None:
            spread = merge(spread, is_token, routing, num_tokens)
        else:
            spread = place_in_order(spread, is_token, routing, layout)
            is_token = is_token & ~is_newline(is_token, layout)  # no expert has chosen a newline
        if plan is not None:
            spread, is_token = plan.unpack(spread), plan.unpack(is_token)
        top_k = cast(MixtureProjector, bank[0]).top_k
        losses[f"{medium}_balance"], losses[f"{medium}_z"] = routing_losses(spread, is_token, top_k=top_k)
    return losses
