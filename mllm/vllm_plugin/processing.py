"""Prepares the media of prompts for vLLM: counted at the budget of their prompt, and put in place of placeholders.

Knows vLLM's interfaces of multimodal processing. What is behind them is in `items.py`, `budgets.py` and `parsing.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from mllm.budget import Budget, Space, count_tokens
from mllm.evaluation.bench import made_up_media
from mllm.media.in_memory import USUAL_RATES
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor
from mllm.processing.requests import read_chat
from mllm.vllm_plugin.budgets import KEYS, budget_of
from mllm.vllm_plugin.items import EngineItem, engine_item
from mllm.vllm_plugin.parsing import DecodedMedium, ElasticDataParser

ON_HOST = ("size", "each", "rate", "order")
"""Tensors of an item that stay on the host: they are numbers that shapes depend on."""
PROFILED_SECONDS = 30.0
"""Length of a stream whose encoder reads any length, in the engine's own trial runs; longer ones are refused where they
give more soft tokens than the engine's largest batch has. `--limit-mm-per-prompt` changes it."""


class ElasticInfo(BaseProcessingInfo):
    """Says which media the model takes, and at which budget."""

    def get_hf_processor(self, **kwargs: object) -> ElasticProcessor:
        return self.processor

    @cached_property
    def processor(self) -> ElasticProcessor:
        """Return the processor of the export."""
        return ElasticProcessor.from_pretrained(self.ctx.model_config.model, trust_remote_code=False)

    @property
    def space(self) -> Space:
        """Return the budgets that were trained."""
        return self.processor.space

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.processor.placeholder_ids)

    def get_data_parser(self) -> MultiModalDataParser:
        return ElasticDataParser(self.processor)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {medium: self.largest_items[medium].num_tokens for medium in mm_counts}

    @cached_property
    def largest_items(self) -> dict[str, EngineItem]:
        """Make up the largest item of each medium, at the largest trained budget."""
        largest = self.space.largest()
        items = {m: [self.counted(loaded, largest) for loaded in self._made_up(m)] for m in self.processor.media}
        return {medium: max(made, key=lambda item: item.num_tokens) for medium, made in items.items()}

    def _made_up(self, medium: str) -> list[LoadedMedia]:
        """Make up items of which one takes the most tokens."""
        processor = self.processor
        if medium == "image" and processor.tiling is not None:
            tile = processor.facts["image"].image_pixels
            assert tile is not None
            sizes = [(rows * tile[0], columns * tile[1]) for rows, columns in processor.tiling.shapes(tile)]
            return [processor.transform("image", Image.fromarray(np.zeros((*size, 3), np.uint8))) for size in sizes]
        options = self.ctx.get_mm_config().limit_per_prompt.get(medium)
        samples, frames = getattr(options, "length", None), getattr(options, "num_frames", None)
        seconds = PROFILED_SECONDS
        if medium == "audio":
            seconds = samples / USUAL_RATES["audio"] if samples else min(seconds, processor.window_seconds or seconds)
        elif medium == "video" and frames:
            seconds = frames / USUAL_RATES["video"]
        return made_up_media(processor, [medium], seconds)

    def budget(self, options: Mapping[str, object]) -> Budget:
        """Read the budget of a prompt: its own, or the engine's, or the largest.

        Raises:
            ValueError: as `budget_of`.
        """
        if not options:
            options = self.ctx.get_mm_config().mm_processor_kwargs or {}
        return budget_of(options, self.space)

    def item(self, decoded: DecodedMedium, budget: Budget) -> EngineItem:
        """Transform and count one medium.

        Raises:
            MediaError, ValueError: what its encoder cannot take, or a budget that it cannot meet.
        """
        medium, amounts = decoded.medium, budget.only({decoded.medium})
        request = read_chat([{"role": "user", "content": [{"type": medium, medium: decoded.raw}]}])
        (loaded,) = self.processor.prepare_media(
            request.sample, [decoded.raw], budgets=[amounts], in_memory=request.in_memory
        )
        return self.counted(loaded, amounts)

    def counted(self, loaded: LoadedMedia, budget: Budget) -> EngineItem:
        """Make the item of a loaded medium at a budget.

        Raises:
            ValueError: a budget that it cannot meet.
        """
        (count,) = count_tokens([self.processor.extent(loaded)], budget.only({loaded.medium}), self.space)
        return engine_item(self.processor, loaded, count)


class ElasticDummyInputs(BaseDummyInputsBuilder[ElasticInfo]):
    """Hands out the media of the engine's own trial runs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        tokens, ids = self.info.processor.tokenizer.convert_ids_to_tokens, self.info.processor.placeholder_ids
        return "".join(tokens(ids[medium]) * mm_counts[medium] for medium in self._distinct(mm_counts))

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, list[EngineItem]]:
        return {medium: [self.info.largest_items[medium]] * mm_counts[medium] for medium in self._distinct(mm_counts)}

    def _distinct(self, media: Iterable[str]) -> list[str]:
        """Leave out videos of frames beside images, whose placeholders are the same."""
        return [medium for medium in media if medium not in self.info.processor.sampling or {*media} == {medium}]


class ElasticVllmProcessor(BaseMultiModalProcessor[ElasticInfo]):
    """Transforms and counts each medium alone, so that vLLM may keep it whatever stands beside it."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """Prepare a prompt.

        Raises:
            ValueError: a budget of a medium that the prompt does not hold, as everywhere; or see `ElasticInfo.item`.
        """
        options = inputs.hf_processor_mm_kwargs
        if any(key in options for key in KEYS):
            budget = self.info.budget(options)
            if idle := budget.media - inputs.mm_data_items.keys():
                raise ValueError(f"the budget {str(budget)!r} names {min(idle)}, but the request holds none")
        return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        budget = self.info.budget(hf_kwargs)
        fields: dict[str, list[Any]] = {}
        for medium, items in mm_items.items():
            for item in items.get_all():
                counted = self.info.item(item, budget) if isinstance(item, DecodedMedium) else item
                for name, tensor in counted.tensors.items():
                    fields.setdefault(f"{medium}_{name}", []).append(tensor)
        return BatchFeature(fields)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        configs = {}
        for name in hf_inputs:
            medium, _, field = name.partition("_")
            configs[name] = MultiModalFieldConfig.batched(medium, keep_on_cpu=field in ON_HOST)
        return configs

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        ids = self.info.processor.placeholder_ids

        def span(medium: str) -> Any:
            return lambda number: [ids[medium]] * len(out_mm_kwargs[medium][number][f"{medium}_order"].data)

        return [PromptReplacement(medium, [ids[medium]], span(medium)) for medium in mm_items]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        """Put the spans of soft tokens in place.

        Raises:
            ValueError: placeholders that are not the prompt's media, as text that spells them would make them; or
                images beside videos of frames, whose placeholders are the same.
        """
        ids = self.info.processor.placeholder_ids
        if {"image", "video"} <= mm_prompt_updates.keys() and ids["image"] == ids["video"]:
            raise ValueError(
                "a prompt holds images and a video of frames, whose order vLLM is not told; send them through "
                "`mllm serve --engine vllm`, or in prompts of `mllm.vllm_plugin.prompts`"
            )
        for medium, updates in mm_prompt_updates.items():
            if (held := token_ids.count(ids[medium])) != len(updates):
                raise ValueError(
                    f"the prompt holds {held} times {PLACEHOLDER_TOKENS[medium]}, which stands for one {medium} each, "
                    f"and {len(updates)} of {medium}"
                )
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)
