"""Makes prompts for vLLM's Python interface: the same ids, media and counts that `Answerer` reads.

    llm = vllm.LLM("exported", limit_mm_per_prompt={"audio": 1, "video": 1})
    llm.generate([engine_prompt(processor, sample, "audio=/4,video=/2")], SamplingParams(temperature=0))

Knows a processor, samples and budgets. Does not import vLLM.
"""

from collections.abc import Sequence
from typing import Any

from mllm.budget import Budget, BudgetInput, TokenCount
from mllm.data.manifest import Sample
from mllm.media import InMemoryMedium, Reader
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.processor import ElasticProcessor
from mllm.vllm_plugin.items import engine_items


def engine_prompt(
    processor: ElasticProcessor,
    sample: Sample,
    budget: BudgetInput = "",
    *,
    loader: Reader | None = None,
    in_memory: Sequence[InMemoryMedium | None] = (),
) -> dict[str, Any]:
    """Load, count and encode one conversation; a last assistant message is left out, and answered instead.

    Args:
        budget: any budget, caps over all media included: they are split here, where all media are known.
        loader, in_memory: as those of `ElasticProcessor.load_media`.

    Raises:
        MediaError, ValueError: as `ElasticProcessor.load_media` and `batch`; or a budget that cannot be met.
    """
    amounts = Budget.of(budget)
    loaded = processor.load_media(sample, loader=loader, budgets=[amounts], in_memory=in_memory)
    row = processor.batch([sample], [loaded], for_training=False, with_values=False).rows[0]
    return prompt_of(processor, row.ids, loaded, row.token_counts(amounts, processor.space))


def prompt_of(
    processor: ElasticProcessor, ids: Sequence[int], media: Sequence[LoadedMedia], counts: Sequence[TokenCount]
) -> dict[str, Any]:
    """Make the prompt of a row whose media are loaded and counted.

    Args:
        ids: with one placeholder per medium.

    Raises:
        ValueError: as `mllm.vllm_plugin.items.engine_item`.
    """
    prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
    if media:
        prompt["multi_modal_data"] = engine_items(processor, media, counts)
    return prompt
