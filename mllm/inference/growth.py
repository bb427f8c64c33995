"""Answers one request at one budget after another, and reads of each prompt only what is new in it.

Knows a model, its processor, a decoding and key-value caches. Does not know which budget comes next, or batches.

The LLM is causal: keys and values hold as long as everything before them is the same. So a prompt at a larger budget is
read from the first position where it differs from the one before, whatever that is: with one image and a compressor
whose smaller budgets begin its larger ones, behind the soft tokens that are there; with several images, or an image in
tiles, behind those of the first that grows. A session about one image, with many questions, is in
`mllm.inference.progressive`.

Shapes: S positions of a prompt, n of them kept, H the LLM's width.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from mllm.budget import MEDIA, Budget, TokenCount
from mllm.inference.decoding import Decoding, generate_answers
from mllm.inference.request import Answer, is_trained, tokens_by_medium
from mllm.inference.timing import Timing, stopped
from mllm.kv_cache.beam import spread
from mllm.kv_cache.copies import copy_of
from mllm.kv_cache.names import cache_argument
from mllm.model.media_arguments import MEDIA_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.processing.batch import Batch, EncodedSample
from mllm.processing.processor import ElasticProcessor
from mllm.processing.token_order import NEWLINE, order_of, shown_items

Position = Hashable
"""What stands at a position of a prompt, so that equal ones hold equal embeddings: an id, or one soft token."""


@dataclass(frozen=True)
class SoftToken:
    """Names one soft token of a request; `count` is 0 where it is the same at every budget that holds it."""

    medium: str
    span: int
    piece: int
    token: int
    count: int


def grows(model: ElasticForConditionalGeneration, processor: ElasticProcessor, decoding: Decoding) -> bool:
    """Tell whether prompts of a model may keep soft tokens of an image when its budget grows."""
    compressors = model.model.compressors
    if processor.host is not None or decoding.static_cache or "image" not in compressors:
        return False
    return compressors["image"].nested == "prefix"


def positions_of(
    row: EncodedSample, counts: Sequence[TokenCount], processor: ElasticProcessor, *, is_nested: bool
) -> list[Position]:
    """Name what stands at every position of a prompt whose media cost so many soft tokens.

    Args:
        is_nested: smaller budgets of images begin larger ones, see `grows`.
    """
    placeholders = set(processor.placeholder_ids.values())
    spans = iter(enumerate(zip(row.spans, counts, strict=True)))
    positions: list[Position] = []
    for token in row.ids:
        if token not in placeholders:
            positions.append(token)
            continue
        number, (span, count) = next(spans)
        medium = span.extent.medium
        items = shown_items(span.extent, count, span.tilings)
        # On a stream a larger budget puts tokens between those that are there, whatever the compressor.
        each = 0 if is_nested and span.encoder == "image" else count.each or count.tokens
        for piece, index in order_of(span.extent, count, processor.space.media[medium].tiling).tolist():
            item = NEWLINE if piece == NEWLINE else items[piece]
            positions.append(SoftToken(medium, number, item, index, each))
    return positions


def num_kept(before: Sequence[Position], after: Sequence[Position]) -> int:
    """Count the positions that two prompts begin with alike; the last of either is read by `generate`, and not kept."""
    most = max(min(len(before), len(after)) - 1, 0)
    return next((number for number in range(most) if before[number] != after[number]), most)


def num_soft(positions: Sequence[Position]) -> dict[str, int]:
    """Count soft tokens by medium."""
    found = [position.medium for position in positions if isinstance(position, SoftToken)]
    return {medium: found.count(medium) for medium in MEDIA if medium in found}


def kept_tokens(
    row: EncodedSample, counts: Sequence[Sequence[TokenCount]], processor: ElasticProcessor
) -> NDArray[np.float64]:
    """Count the soft tokens that prompts at P counts have in common where smaller budgets begin larger ones.

    Args:
        counts: by prompt, smallest first, of every medium.

    Returns:
        (P, P) of the prompt in the column behind that in the row; zero where that is no larger.
    """
    prompts = [positions_of(row, one, processor, is_nested=True) for one in counts]
    kept = np.zeros((len(prompts), len(prompts)))
    for before, after in itertools.combinations(range(len(prompts)), 2):
        common = prompts[after][: num_kept(prompts[before], prompts[after])]
        kept[before, after] = sum(num_soft(common).values())
    return kept


class GrowingPrompt:
    """Answers one request at one budget after another.

    Args:
        model: in eval mode; it must not be changed meanwhile.
        processor: the one that belongs to it.
        decoding: how tokens are chosen.
        row: the request; it ends with text.
        features: of its media, by the medium whose encoder it is.
    """

    def __init__(
        self,
        model: ElasticForConditionalGeneration,
        processor: ElasticProcessor,
        decoding: Decoding,
        row: EncodedSample,
        features: Mapping[str, Features],
    ) -> None:
        self._model, self._processor, self._decoding = model, processor, decoding
        self._row, self._features = row, features
        self._is_nested = grows(model, processor, decoding)
        self._positions: list[Position] = []
        self._experts: dict[str, int] = {}
        self._cache = DynamicCache()

    @torch.no_grad()
    def answer(self, budget: Budget, *, timed: bool = False) -> Answer:
        """Answer at a budget; of the prompt, what the last one has in common with it is not read again.

        Its `tokens` are those that were read now, and `num_kept_tokens` counts the positions that were not.
        """
        model, processor, device = self._model, self._processor, self._model.device
        watch = stopped(device) if timed else None
        expanded = processor.expand(Batch([self._row]), [[budget]], left_padding=True)
        inputs = {key: value.to(device) for key, value in expanded.inputs.items()}
        counts = expanded.token_counts[0]
        positions = positions_of(self._row, counts, processor, is_nested=self._is_nested)
        experts = {key: int(expanded.inputs[key][0]) for key in ("scale_ids", "task_ids") if key in expanded.inputs}
        kept = num_kept(self._positions, positions) if experts == self._experts else 0
        media = {key: inputs.pop(key, None) for key in MEDIA_KEYS}
        embeds = model.model.embed(inputs["input_ids"], media, features=self._features)
        encoded = None if watch is None else watch()
        self._read(embeds, kept, {key: inputs[key] for key in experts})
        self._positions, self._experts = positions, experts
        read = None if watch is None else watch()
        cache = copy_of(self._cache)
        if self._decoding.num_beams > 1:
            cache = spread(cache, self._decoding.num_beams)
        soft = torch.isin(inputs["input_ids"], torch.tensor(list(processor.placeholder_ids.values()), device=device))
        prompt = {**inputs, "input_ids": inputs["input_ids"].masked_fill(soft, processor.pad_id)}
        generated = generate_answers(model, processor, self._decoding, prompt | cache_argument(cache))[0]
        decoded = None if watch is None else watch()
        extents = [span.extent for span in self._row.spans]
        new = num_soft(positions[kept:])
        return Answer(
            text=processor.batch_decode([generated.ids], skip_special_tokens=True)[0].strip(),
            budget=budget,
            tokens={medium: new.get(medium, 0) for medium in tokens_by_medium(extents, counts)},
            is_trained=is_trained(extents, counts, processor.space),
            num_prompt_tokens=len(positions),
            num_new_tokens=len(generated.ids),
            timing=None if encoded is None or read is None or decoded is None else Timing(encoded, read, decoded),
            is_cut=not generated.has_end,
            min_probability=generated.min_probability,
            mean_log_probability=generated.mean_log_probability,
            num_kept_tokens=kept,
        )

    def _read(self, embeds: Tensor, kept: int, experts: Mapping[str, Tensor]) -> None:
        """Let the LLM read a prompt (1, S, H) behind the first n positions, up to the last, which `generate` reads."""
        length = embeds.shape[1]
        if kept == 0:
            self._cache = DynamicCache()
        elif (surplus := self._cache.get_seq_length() - kept) > 0:
            self._cache.crop(-surplus)
        unread = embeds[:, kept : length - 1]
        if unread.shape[1] == 0:
            return
        self._model(
            inputs_embeds=unread,
            attention_mask=torch.ones(1, length - 1, dtype=torch.int64, device=embeds.device),
            position_ids=torch.arange(kept, length - 1, device=embeds.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self._cache),
            **experts,
        )
