"""What mixtures of projectors left behind in a forward pass, as losses by row.

Knows compressors, placeholders and how rows are packed. Does not know the LLM, or what the losses are multiplied by.

Shapes: B rows, S positions.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from mllm.compressors import MixtureProjector, ProjectorBank
from mllm.compressors.moe_projector import routing_losses
from mllm.model.splice import is_newline, merge, place
from mllm.packing.plan import SegmentPlan


def losses_of_routing(
    compressors: nn.ModuleDict,
    placeholder_ids: Mapping[str, int],
    input_ids: Tensor | None,
    media: Mapping[str, Tensor | None],
    plan: SegmentPlan | None,
) -> dict[str, Tensor]:
    """Balance and size of the logits of every mixture, (B,) by name; nothing is kept.

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
        spread = routing.new_zeros(*input_ids.shape, routing.shape[-1])
        layout = media.get(f"{medium}_layout") if plan is None else plan.layouts.get(medium)
        if layout is None:
            spread = merge(spread, is_token, routing, num_tokens)
        else:
            spread = place(spread, is_token, routing, layout)
            is_token = is_token & ~is_newline(is_token, layout)
        if plan is not None:
            spread, is_token = plan.unpack(spread), plan.unpack(is_token)
        top_k = cast(MixtureProjector, bank[0]).top_k
        losses[f"{medium}_balance"], losses[f"{medium}_z"] = routing_losses(spread, is_token, top_k=top_k)
    return losses
