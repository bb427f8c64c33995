"""Computes the soft tokens of an engine's items: several at once through one encoder and one compressor.

Knows the model and the tensors of items. Does not know engines or budgets as words.

Shapes: N encoded items, R spans, K soft tokens of the longest, H the LLM's hidden size; see `mllm.vllm_plugin.items`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mllm.model.modeling import ElasticModel

NestedTensors = Tensor | Sequence[Tensor]
"""Tensors of several items: stacked, where they are of one shape."""


def soft_tokens_of(model: ElasticModel, medium: str, items: Mapping[str, NestedTensors]) -> list[Tensor]:
    """Encode and compress items of one medium, each at its own count.

    Args:
        items: the tensors of several items by the names of `mllm.vllm_plugin.items.FIELDS`; `each`, `rate` and `order`
            lie on the host.

    Returns:
        Per item (n, H), in the order in which they stand in the prompt.
    """
    values, sizes = list(items["values"]), items.get("size")
    each = [int(number) for number in items["each"]]
    rates = [int(number) for number in items["rate"]]
    pieces = [1] * len(values)
    if sizes is None:  # images, each of them one or several to the encoder
        pieces = [len(images) for images in values]
        raw = torch.cat(values)
    else:
        raw = pad_sequence(values, batch_first=True)
        sizes = sizes if isinstance(sizes, Tensor) else torch.stack(list(sizes))
    features = model.encode(medium, raw, None if sizes is None else sizes.to(raw.device))
    soft = model.compress(
        medium,
        features,
        num_tokens=_repeated(each, pieces, raw.device),
        rates=None if medium == "image" else _repeated(rates, pieces, raw.device),
        max_tokens=max(each),
    )
    orders = [order.to(raw.device) for order in items["order"]]
    newline = soft.new_zeros(soft.shape[-1]) if model.newline is None else model.newline().to(soft.dtype)
    return [_placed(tokens, order, newline) for tokens, order in zip(soft.split(pieces), orders, strict=True)]


def _repeated(numbers: Sequence[int], pieces: Sequence[int], device: torch.device) -> Tensor:
    """Say the number of each item once for each of its encoded images."""
    each = [number for number, count in zip(numbers, pieces, strict=True) for _ in range(count)]
    return torch.tensor(each, device=device)


def _placed(soft: Tensor, order: Tensor, newline: Tensor) -> Tensor:
    """Put the tokens (k, K, H) of one item in their order (n, 2)."""
    piece, number = order.unbind(dim=-1)
    return torch.where((piece < 0)[:, None], newline, soft[piece.clamp(min=0), number])
