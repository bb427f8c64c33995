"""Reads the text that all requests begin with once and keeps it from one batch to the next.

Knows ids, ids of experts and key-value caches. Does not know media, budgets or how tokens are chosen.

What the LLM reads of a beginning depends on nothing that follows it, so a system prompt that stands before every
image needs to be read for the first batch alone. Which text that is shows by itself: it is what the rows of a batch
and those of the batches before it have in common, up to their first soft token.

Shapes: B rows, S positions, C tokens of the constant text.
"""

import copy
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mllm.kv_cache.names import cache_argument
from mllm.kv_cache.shared_prefix import Prefixes, num_common

MIN_TOKENS = 8
"""A shorter beginning is not worth the copy."""


@dataclass
class ReadText:
    """Ids that rows begin with, and their keys and values once the LLM has read them."""

    ids: tuple[int, ...]
    cache: DynamicCache | None = field(default=None, repr=False)

    def first(self, length: int) -> "ReadText":
        """Returns its beginning, of which nothing is read again."""
        if self.cache is None:
            return ReadText(self.ids[:length])
        cache = _copy(self.cache)
        for layer in cache.layers:
            layer.keys, layer.values = (states[..., :length, :] for states in (layer.keys, layer.values))  # pyright: ignore
        return ReadText(self.ids[:length], cache)

    def on_rows(self, model: nn.Module, attention_mask: Tensor, **row_inputs: Tensor | None) -> DynamicCache:
        """Makes a cache for rows padded on the left (B, S), with at least the last position of each left to read.

        Args:
            model: takes ids, positions and a cache.
            row_inputs: (B,) what else it takes per row, the same for all.
        """
        device = attention_mask.device
        if self.cache is None:
            self.cache = DynamicCache()
            ids = torch.tensor([self.ids], device=device)
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(self.cache),
                **{key: None if value is None else value[:1] for key, value in row_inputs.items()},
            )
        length = torch.tensor([len(self.ids)], device=device)
        index = torch.zeros(len(attention_mask), dtype=torch.int64, device=device)
        return Prefixes(index, length, attention_mask).spread_to_rows(_copy(self.cache), length)


@dataclass
class SystemPrompt:
    """Keeps what the LLM has read of the batches so far, apart for each choice of experts that served one.

    The model may be trained in between, which shows; adapters must not be switched on or off.
    """

    _kept: dict[Hashable, ReadText] = field(default_factory=dict, repr=False)
    _stamp: Hashable = None

    def of_batch(
        self, model: nn.Module, inputs: Mapping[str, Tensor], placeholders: Collection[int]
    ) -> ReadText | None:
        """Finds the constant text of a batch; None where it is too short, or the rows have different experts.

        Args:
            model: the LLM.
            inputs: of `generate`, on the host and padded on the left.
            placeholders: ids of soft tokens.
        """
        if (stamp := _stamp_of(model)) != self._stamp:
            self._kept, self._stamp = {}, stamp
        expert_ids = [inputs[key].tolist() for key in ("scale_ids", "task_ids") if key in inputs]
        if any(len(set(ids)) > 1 for ids in expert_ids):
            return None
        key = tuple(ids[0] for ids in expert_ids)  # other experts read other keys and values
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        common = _beginning(rows, placeholders)
        kept = self._kept.get(key)
        num_same = 0 if kept is None else num_common([kept.ids, common])
        if kept is not None and num_same >= MIN_TOKENS:
            self._kept[key] = kept if num_same == len(kept.ids) else kept.first(num_same)
        elif len(common) >= MIN_TOKENS:
            self._kept[key] = ReadText(tuple(common))
        else:
            return None
        return self._kept[key]


def _beginning(rows: Sequence[Sequence[int]], placeholders: Collection[int]) -> Sequence[int]:
    """Returns what all rows begin with: text alone, and never a whole row, whose last token gives the first logits."""
    texts = []
    for row in rows:
        end = next((position for position, token in enumerate(row) if token in placeholders), len(row) - 1)
        texts.append(row[:end])
    return texts[0][: num_common(texts)]


def _copy(cache: DynamicCache) -> DynamicCache:
    """Copies the layers; their tensors are the same, since they are replaced and never written to."""
    copied = DynamicCache()
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _stamp_of(model: nn.Module) -> Hashable:
    """Returns a value that changes when a weight is replaced or written to."""
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in model.parameters())
