"""The text that all requests begin with, read once and kept from one batch to the next.

Knows ids, the adapter's members and key-value caches. Does not know media, budgets or how tokens are chosen.

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

FEWEST_TOKENS = 8
"""A shorter beginning is not worth the copy."""


@dataclass
class ConstantText:
    """Ids that rows begin with, and what the LLM made of them once it has read them."""

    ids: tuple[int, ...]
    cache: DynamicCache | None = field(default=None, repr=False)

    def first(self, length: int) -> "ConstantText":
        """Its beginning, of which nothing is read again."""
        if self.cache is None:
            return ConstantText(self.ids[:length])
        cache = _copy(self.cache)
        for layer in cache.layers:
            layer.keys, layer.values = (states[..., :length, :] for states in (layer.keys, layer.values))  # pyright: ignore
        return ConstantText(self.ids[:length], cache)

    def on_rows(self, model: nn.Module, attention_mask: Tensor, **row_inputs: Tensor | None) -> DynamicCache:
        """A cache for rows padded on the left (B, S), with at least the last position of every row left to read.

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
        return Prefixes(index, length, attention_mask).hand_out(_copy(self.cache), length)


@dataclass
class ConstantPrompt:
    """What is kept of the batches so far, for each expert of the adapter that has served one.

    The model may be trained in between, which shows; adapters must not be switched on or off.
    """

    _kept: dict[Hashable, ConstantText] = field(default_factory=dict, repr=False)
    _stamp: Hashable = None

    def of_batch(
        self, model: nn.Module, inputs: Mapping[str, Tensor], placeholders: Collection[int]
    ) -> ConstantText | None:
        """The constant text of a batch; none where it is too short, or the rows are not served by the same members.

        Args:
            model: the LLM.
            inputs: of `generate`, on the host and padded on the left.
            placeholders: ids of soft tokens.
        """
        if (stamp := _stamp_of(model)) != self._stamp:
            self._kept, self._stamp = {}, stamp
        members = [inputs[key].tolist() for key in ("scale_ids", "task_ids") if key in inputs]
        if any(len(set(own)) > 1 for own in members):
            return None
        key = tuple(own[0] for own in members)
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        common = _beginning(rows, placeholders)
        known = self._kept.get(key)
        same = 0 if known is None else num_common([known.ids, common])
        if known is not None and same >= FEWEST_TOKENS:
            self._kept[key] = known if same == len(known.ids) else known.first(same)
        elif len(common) >= FEWEST_TOKENS:
            self._kept[key] = ConstantText(tuple(common))
        else:
            return None
        return self._kept[key]


def _beginning(rows: Sequence[Sequence[int]], placeholders: Collection[int]) -> Sequence[int]:
    """What all rows begin with: text alone, and never a whole row, whose last token gives the first logits."""
    texts = []
    for row in rows:
        end = next((place for place, token in enumerate(row) if token in placeholders), len(row) - 1)
        texts.append(row[:end])
    return texts[0][: num_common(texts)]


def _copy(cache: DynamicCache) -> DynamicCache:
    """Layers of its own; tensors are the same, and are replaced and not written to."""
    own = DynamicCache()
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def _stamp_of(model: nn.Module) -> Hashable:
    """Changes when a weight is replaced or written to."""
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in model.parameters())
