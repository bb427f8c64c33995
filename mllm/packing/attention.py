"""Computes attention over a packed row: each segment sees itself causally and the ranges before it that its plan names.

Knows a `SegmentPlan`, queries, keys and values. Does not know rows, budgets or which decoder asks.

The LLM gets the plan as the keyword `segment_plan`, which decoders of transformers pass on to every layer and each
layer to this function, in the backward pass of a layer that is computed again as well. Without a plan this is
transformers' own `sdpa`. The mask that transformers would make of positions that begin anew is never made: a packed
row brings a mask of four dimensions, which is taken as it is; for `sdpa` it holds nothing, for `flex` it is the block
mask.

Shapes: h heads, L tokens of the packed row, d size of a head, n tokens of a segment, v tokens it sees before itself.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mllm.packing.plan import SegmentPlan

IMPLEMENTATION = "mllm_segments"
KEYWORD = "segment_plan"
PackedAttention = Literal["sdpa", "flex"]


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    segment_plan: SegmentPlan | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers asks in every layer; (1, h, L, d) each -> (1, L, h, d)."""
    if segment_plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if query.device.type != "cpu":
        return by_segment(query, key, value, segment_plan, dropout=dropout, scaling=scaling), None
    # On a CPU the backward pass takes more than twice as long in bfloat16 as in float32, whatever the casts cost.
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        out = by_segment(query.to(wide), key.to(wide), value.to(wide), segment_plan, dropout=dropout, scaling=scaling)
    return out.to(query.dtype), None


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, *, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """Attend by one scaled dot product attention per segment; (1, h, L, d) each -> (1, L, h, d).

    What segments see before themselves is gathered for all of them at once, and everything is split once: the
    gradient of a slice is as large as what it was cut from, that of a split is not.
    """
    lengths = [segment.length for segment in plan.segments]
    queries = query.split(lengths, dim=2)
    segment_keys, segment_values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    sizes = [segment.length + segment.num_visible for segment in plan.segments if segment.visible]
    visible_keys, visible_values = (iter(_gather(states, plan.attended, sizes)) for states in (key, value))
    masks, out = iter(plan.masks), []
    for index, (segment, segment_query) in enumerate(zip(plan.segments, queries, strict=True)):
        if segment.visible:
            keys, values, mask = next(visible_keys), next(visible_values), next(masks)
        else:  # no mask is needed, which lets the fastest kernels run
            keys, values, mask = segment_keys[index], segment_values[index], None
        out.append(
            functional.scaled_dot_product_attention(
                segment_query, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            ).transpose(1, 2)
        )
    return torch.cat(out, dim=1)


def _gather(states: Tensor, token_numbers: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Gather for each segment the states it sees: (1, h, L, d) -> (1, h, v + n, d) each."""
    if not sizes:
        return ()
    gathered = states[0].transpose(0, 1).index_select(0, token_numbers)
    return tuple(part.transpose(0, 1)[None] for part in gathered.split(sizes))


def packed_mask(plan: SegmentPlan, device: torch.device, attention: PackedAttention) -> Any:
    """Make what stands for the attention mask of a packed row, once for all layers."""
    if attention == "sdpa":
        return torch.empty(0, 0, 0, 0, device=device)
    return create_block_mask(mask_function(plan, device), None, None, plan.num_tokens, plan.num_tokens, device=device)


def mask_function(plan: SegmentPlan, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the plan as flex attention asks for it: may the query at one position see the key at another."""
    owners, limits = plan.owners().to(device), plan.limits().to(device)

    def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key < limits[owners[query], owners[key]])

    return is_seen


def obstacle(llm: PreTrainedModel) -> str | None:
    """Say why an LLM cannot read packed rows, or None: its tokens may meet in full, causal attention only."""
    text: Any = llm.config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{text.model_type} has layers of {', '.join(sorted(kinds))}; packed rows need full attention in all"
    if getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True):
        return f"{text.model_type} attends within a window of {text.sliding_window} tokens"
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
        return f"{text.model_type} has positions of three dimensions, and a plan has those of one"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return f"{text.model_type} caps its attention logits"
    if not getattr(llm, "_supports_attention_backend", False):
        return f"the attention of {text.model_type} cannot be replaced"
    if text._attn_implementation not in ("sdpa", IMPLEMENTATION):
        return f"the LLM was loaded with attention {text._attn_implementation}"
    return None


def enable_packing(llm: PreTrainedModel) -> None:
    """Let an LLM read packed rows; rows that are not packed are read as before.

    Raises:
        ValueError: an LLM that cannot.
    """
    if (reason := obstacle(llm)) is not None:
        raise ValueError(f"rows cannot be packed: {reason}")
    llm.set_attn_implementation(IMPLEMENTATION)


def is_enabled(llm: PreTrainedModel) -> bool:
    """Tell whether an LLM reads packed rows."""
    return llm.config._attn_implementation == IMPLEMENTATION


AttentionInterface.register(IMPLEMENTATION, segment_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
