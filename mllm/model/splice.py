"""Puts soft tokens into text: their embeddings at the placeholders of the sequence.

Knows ids, counts and tensors. Does not know media, budgets or what an id means.

Shapes: B rows, S positions, R runs of placeholders, K soft tokens of the longest run, H the LLM's hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_placeholders(
    input_ids: Tensor, placeholder_id: int, num_tokens: Tensor | int, name: str, row_ids: Sequence[str] = ()
) -> None:
    """Refuse a batch whose placeholders are not exactly its soft tokens; called on the host, before the transfer.

    Args:
        input_ids: (B, S).
        num_tokens: (R,) soft tokens of each span, or their sum.
        name: the medium, named in the error.
        row_ids: sample ids of the rows, named in the error.

    Raises:
        ValueError: with both counts.
    """
    num_placeholders = int((input_ids == placeholder_id).sum())
    expected = num_tokens if isinstance(num_tokens, int) else int(num_tokens.sum())
    if num_placeholders != expected:
        samples = f" in samples {', '.join(row_ids)}" if row_ids else ""
        raise ValueError(
            f"{num_placeholders} {name} placeholders in the text for {expected} {name} soft tokens{samples}"
        )


def merge(inputs_embeds: Tensor, is_placeholder: Tensor, soft: Tensor, num_tokens: Tensor) -> Tensor:
    """Put soft tokens at their placeholders.

    Args:
        inputs_embeds: (B, S, H) text embeddings; what they hold at placeholders does not matter.
        is_placeholder: (B, S) bool; as many as `num_tokens` sums to.
        soft: (R, K, H) soft tokens by span, in order of appearance; what lies beyond a span's count does not matter.
        num_tokens: (R,) soft tokens of each span.

    Returns:
        (B, S, H). Every position is found by index arithmetic, so nothing waits for the device.
    """
    ends = num_tokens.cumsum(0)
    number = is_placeholder.flatten().cumsum(0) - 1  # how many placeholders came before, at placeholders
    span = torch.searchsorted(ends, number, right=True).clamp(max=len(num_tokens) - 1)
    offset = (number - (ends - num_tokens)[span]).clamp(0, soft.shape[1] - 1)
    picked = soft.to(inputs_embeds.dtype)[span, offset].view_as(inputs_embeds)
    return torch.where(is_placeholder[..., None], picked, inputs_embeds)


def place_in_order(
    inputs_embeds: Tensor, is_placeholder: Tensor, soft: Tensor, layout: Tensor, newline: Tensor | None = None
) -> Tensor:
    """Put soft tokens at their placeholders in an order that is given, as tiles of an image need it.

    Args:
        inputs_embeds: (B, S, H). is_placeholder: (B, S) bool.
        soft: (R, K, H) soft tokens by span.
        layout: (P, 2) for each placeholder in turn its span and its number in that; a span of -1 is the newline.
        newline: (H,); zeros where there is none.

    Returns:
        (B, S, H). Nothing waits for the device.
    """
    number = (is_placeholder.flatten().cumsum(0) - 1).clamp(0, len(layout) - 1)
    span, offset = layout[number].unbind(dim=-1)
    picked = soft.to(inputs_embeds.dtype)[span.clamp(min=0), offset]
    newline = torch.zeros_like(picked[0]) if newline is None else newline.to(inputs_embeds.dtype)
    picked = torch.where((span < 0)[:, None], newline, picked).view_as(inputs_embeds)
    return torch.where(is_placeholder[..., None], picked, inputs_embeds)


def is_newline(is_placeholder: Tensor, layout: Tensor) -> Tensor:
    """Tell which placeholders are newlines, (B, S) bool."""
    number = (is_placeholder.flatten().cumsum(0) - 1).clamp(0, len(layout) - 1)
    return is_placeholder & (layout[number, 0] < 0).view_as(is_placeholder)
