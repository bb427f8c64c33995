"""Defines an exported checkpoint as a vLLM model: encoders and compressors are ours, the LLM is vLLM's own.

Knows vLLM's interfaces of models and the names of an export's weights. Does not know budgets or files.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from mllm.budget import MEDIA
from mllm.model.configuration import TOWER_NAMES, ElasticConfig
from mllm.model.modeling import ElasticModel
from mllm.model.precision import keep_in_float32
from mllm.processing.processor import PLACEHOLDER_TOKENS
from mllm.vllm_plugin.items import FIELDS
from mllm.vllm_plugin.processing import ElasticDummyInputs, ElasticInfo, ElasticVllmProcessor
from mllm.vllm_plugin.soft_tokens import soft_tokens_of

LLM_WEIGHTS = ("model.language_model.", "lm_head.")


@MULTIMODAL_REGISTRY.register_processor(ElasticVllmProcessor, info=ElasticInfo, dummy_inputs=ElasticDummyInputs)
class ElasticForVllm(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """Runs an export in vLLM.

    Under tensor parallelism the LLM is split, and every rank has the encoders and the compressors whole: they are small
    beside it, and AV-HuBERT has convolutions that nothing splits.

    Shapes: N tokens of all prompts of a step, H the LLM's hidden size, V its vocabulary.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACEHOLDER_TOKENS[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ElasticConfig = vllm_config.model_config.hf_config
        self.config, self.dtype = config, vllm_config.model_config.dtype
        placeholder_ids = list((config.placeholder_ids or {}).values())
        self.placeholder_ids = placeholder_ids
        self.unsaid_ids = [token for token in config.unsaid_ids if token < config.text_config.vocab_size]
        with self._mark_tower_model(vllm_config, set(config.media or {})):
            self.media = ElasticModel(_without_llm(config)).eval()
            self.media.language_model = None  # pyright: ignore[reportAttributeAccessIssue]
            ours = (self.media.compressors, self.media.newline, self.media.new_tokens)
            keep_in_float32(weight for module in ours if module is not None for weight in module.parameters())
        with self._mark_language_model(vllm_config):
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.packed_modules_mapping = getattr(self.language_model, "packed_modules_mapping", {})
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Compute the soft tokens of items of one medium, each at its own count: (n, H) per item."""
        medium = next(medium for medium in MEDIA if f"{medium}_values" in kwargs)
        items: Mapping[str, Any] = {name: kwargs[f"{medium}_{name}"] for name in FIELDS if f"{medium}_{name}" in kwargs}
        encoder = medium if medium in self.config.encoded_media else "image"
        soft = soft_tokens_of(self.media, encoder, items)
        return [tokens.to(self.dtype) for tokens in soft]

    def _embed_text_input_ids(self, input_ids: Tensor, embed_input_ids: Any, *, is_multimodal: Tensor | None) -> Tensor:
        """Embed ids (N,) as (N, H): placeholders as any token, since soft tokens replace them."""
        # An id may lie beyond the vocabulary, whoever put it there.
        for token in self.placeholder_ids:
            input_ids = input_ids.masked_fill(input_ids == token, 0)
        new_tokens = self.media.new_tokens
        return embed_input_ids(input_ids) if new_tokens is None else new_tokens(input_ids, embed_input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the LLM's decoder."""
        embeds = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute logits (N, V) on the rank that has them; a placeholder is never said."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None and self.unsaid_ids:
            logits[:, self.unsaid_ids] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load an export's weights: what is not the LLM's must be exactly what the encoders and compressors have."""
        media: dict[str, Tensor] = {}

        def of_llm() -> Iterable[tuple[str, Tensor]]:
            for name, value in weights:
                if name.startswith(LLM_WEIGHTS):
                    yield name, value
                else:
                    media[name.removeprefix("model.")] = value

        loaded = AutoWeightsLoader(self).load_weights(of_llm(), mapper=self.hf_to_vllm_mapper)
        self.media.load_state_dict(media)
        return loaded | {f"media.{name}" for name in media}

    def get_mm_mapping(self) -> MultiModelKeys:
        """Say where the parts are, so that a LoRA of the LLM is not put into encoders."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="media.compressors",
            tower_model=[f"media.{tower}" for tower in TOWER_NAMES.values()],
        )


def _without_llm(config: ElasticConfig) -> ElasticConfig:
    """Return the config of the same encoders and compressors around an LLM of no layers and one word."""
    bare = deepcopy(config)
    text = config.text_config
    bare.text_config = LlamaConfig(
        vocab_size=1,
        hidden_size=text.hidden_size,
        intermediate_size=1,
        num_hidden_layers=0,
        num_attention_heads=1,
        initializer_range=getattr(text, "initializer_range", 0.02),
        bos_token_id=None,
        eos_token_id=None,
    )
    return bare
