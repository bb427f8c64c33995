"""Reads the prompt of a beam search once: spreads the key-value cache of a batch over its beams for `generate`.

Knows caches and the arguments of transformers' `generate`. Does not know media, budgets or how beams are chosen: the
search is the library's own, fed with a cache that already holds the prompt up to its last token.

transformers repeats a batch `num_beams` times and then reads the prompt with all rows, though they are equal. After
that, each new token copies the whole cache twice: to append to it and to reorder it. Here the prompt is read by B rows,
and its part of the cache is written once and never moved, because beams change places only within their own row.

Shapes: B rows of a batch, C copies of each (beams), S prompt tokens, G key-value heads, D size of a head.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mllm.kv_cache.names import CACHE_NAMES, cache_argument

GROWTH_TOKENS = 64
"""New tokens get room this many at a time, so that the prompt's part is hardly ever copied."""
_FORBIDS_SHARING = (
    *CACHE_NAMES,
    "position_ids",
    "cache_implementation",
    "cache_config",
    "prefill_chunk_size",
    "assistant_model",
    "custom_generate",
    "negative_prompt_ids",
    "output_attentions",
    "output_hidden_states",
)
"""Options of `generate` that ask for another cache, or to see the pass over the prompt."""


class BeamLayer(DynamicLayer):
    """One layer's cache: the prompt's part, equal for all copies of a row, and behind it what each copy wrote.

    Keys and values lie in stores with room at the end, of which `keys` and `values` are views: appending writes in
    place, and reordering beams moves only what was written behind the prompt.

    Args:
        prompt: cache of the prompt, (B, G, S, D).
        copies: C; the layer then serves B * C rows, copies of a row side by side.
    """

    is_croppable = False

    def __init__(self, prompt: DynamicLayer, copies: int) -> None:
        super().__init__()
        assert prompt.keys is not None
        assert prompt.values is not None
        self.dtype, self.device = prompt.keys.dtype, prompt.keys.device
        self.num_prompt_tokens = prompt.keys.shape[-2]
        self._stores = [_with_room(states, copies) for states in (prompt.keys, prompt.values)]
        self._show(self.num_prompt_tokens)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B * C, G, n, D), and returns everything there is."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._stores[0].shape[-2]:
            self._stores = [_with_room(store[..., :start, :], 1, key_states.shape[-2]) for store in self._stores]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[..., start:end, :] = states
        self._show(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Lets row i go on from what row `beam_idx[i]`, a copy of the same row of the batch, wrote."""
        written = slice(self.num_prompt_tokens, self.get_seq_length())
        for store in self._stores:
            store[..., written, :] = store[..., written, :].index_select(0, beam_idx.to(store.device))

    def _show(self, length: int) -> None:
        self.keys, self.values = (store[..., :length, :] for store in self._stores)


def _with_room(states: Tensor, copies: int, num_new_tokens: int = 0) -> Tensor:
    """Copies states (B, G, S, D) into a store of (B * C, G, more, D)."""
    rows, heads, length, size = states.shape
    store = states.new_empty(rows * copies, heads, length + max(GROWTH_TOKENS, num_new_tokens), size)
    store.unflatten(0, (rows, copies))[..., :length, :] = states[:, None]
    return store


def spread(cache: DynamicCache, copies: int) -> DynamicCache:
    """Turns the cache of B rows into one of B * C rows. Sliding-window layers are repeated, as transformers does.

    Returns:
        The same cache, whose layers have been replaced.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[number] = BeamLayer(layer, copies)
        else:
            layer.batch_repeat_interleave(copies)  # pyright: ignore[reportAttributeAccessIssue] (every layer has it)
    return cache


def num_copies(options: Mapping[str, Any], generation_config: Any) -> int:
    """Counts the rows that `generate` makes of each row of a batch.

    Args:
        options: of `generate`.
        generation_config: the model's own, for what they leave open.
    """
    return max(_option(key, options, generation_config) or 1 for key in ("num_beams", "num_return_sequences"))


def reads_prompt_once(input_ids: Tensor | None, options: Mapping[str, Any], generation_config: Any) -> bool:
    """Tells whether reading the prompt once gives what these options of `generate` ask for."""
    if input_ids is None or input_ids.shape[1] < 2 or options.get("attention_mask") is None:
        return False
    return num_copies(options, generation_config) > 1 and allows_sharing(options, generation_config)


def allows_sharing(options: Mapping[str, Any], generation_config: Any) -> bool:
    """Tells whether these options of `generate` leave the cache to us and need not see the pass over the prompt."""
    if _option("use_cache", options, generation_config) is False:
        return False
    forbidding = [_option(key, options, generation_config) for key in _FORBIDS_SHARING]
    return all(value is None or value is False for value in forbidding)


def _option(key: str, options: Mapping[str, Any], generation_config: Any) -> Any:
    """Reads an option as `generate` does: its argument, else the config passed to it, else the model's own config."""
    values = (options.get(key), getattr(options.get("generation_config"), key, None))
    return next((value for value in values if value is not None), getattr(generation_config, key, None))


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    inputs_embeds: Tensor | None = None,
    past: DynamicCache | None = None,
    **row_inputs: Tensor | None,
) -> DynamicCache:
    """Reads all prompts up to their last token, which `generate` then reads with every copy for the first logits.

    Args:
        input_ids: (B, S), padded on the left. attention_mask: (B, S).
        inputs_embeds: (B, S, H) in place of the ids.
        past: a cache of what has been read of the prompts already, for B rows.
        row_inputs: (B,) what else the model takes per row.

    Returns:
        A cache of S - 1 positions for B rows.
    """
    positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    prompt = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    cache = DynamicCache(config=model.config) if past is None else past
    unread = slice(cache.get_seq_length(), -1)
    if input_ids[:, unread].shape[1] == 0:
        return cache
    model(
        **{key: value[:, unread] for key, value in prompt.items()},
        attention_mask=attention_mask[:, :-1],
        position_ids=positions[:, unread],
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(cache),
        **row_inputs,
    )
    return cache
