"""Embeds prompts here, for engines that run the LLM alone and know nothing of this package.

    mllm export --model runs/demo --out llm --form llm
    llm = vllm.LLM("llm", enable_prompt_embeds=True)
    params = SamplingParams(temperature=0, logit_bias=unsaid(model))
    llm.generate([{"prompt_embeds": prompt_embeds(model, processor, sample, "image=16")}], params)

Knows the model, samples and budgets. Does not know engines.

Shapes: S tokens of a prompt, soft ones included, H the LLM's hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.budget import Budget, BudgetInput
from mllm.data.manifest import Sample
from mllm.media import InMemoryMedium, Reader
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor

UNSAID_BIAS = -100.0
"""The least that engines add to a logit."""


@torch.no_grad()
def prompt_embeds(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    sample: Sample,
    budget: BudgetInput = "",
    *,
    loader: Reader | None = None,
    in_memory: Sequence[InMemoryMedium | None] = (),
) -> Tensor:
    """Embed one conversation as the LLM reads it; a last assistant message is left out, and answered instead.

    Args:
        loader, in_memory: as those of `ElasticProcessor.load_media`.

    Returns:
        (S, H) on the host, in the dtype of the LLM's embeddings.

    Raises:
        MediaError, ValueError: as `ElasticProcessor.load_media`, `batch` and `expand`.
    """
    amounts = Budget.of(budget)
    media = processor.load_media(sample, loader=loader, budgets=[amounts], in_memory=in_memory)
    batch = processor.batch([sample], [media], for_training=False)
    inputs = processor.expand(batch, [[amounts]], left_padding=True).inputs
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.model.embed(inputs["input_ids"], inputs)[0].cpu()


def unsaid(model: ElasticForConditionalGeneration) -> dict[int, float]:
    """List what is to be added to logits, so that no placeholder or mark around a medium is ever answered."""
    config = model.config
    return {token: UNSAID_BIAS for token in config.unsaid_ids if token < config.text_config.vocab_size}
