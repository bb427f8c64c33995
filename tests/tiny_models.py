"""Rows, LLMs and adapters that tests of several packages build tiny models of."""

from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from mllm.budget import Budget
from mllm.checkpoints.build import config_of_parts, put_adapters
from mllm.config.model import LoraBankConfig, LoraConfig, ModelConfig, MomeConfig
from mllm.inference.answerer import Answerer
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import PLACEHOLDER_TOKENS

ROWS = [
    ([tiny.random_media("image"), "what colour is the circle?"], "red"),
    ([tiny.random_media("audio", 37), tiny.random_media("video", 19), "transcribe speech and video to text."], "now"),
    (["how many objects?"], "two"),
    (
        [tiny.random_media("image", seed=1), "or", tiny.random_media("image", seed=2), tiny.random_media("audio", 24)],
        "no",
    ),
]
BUDGETS = [Budget.parse(text) for text in ("image=16", "audio=/4,video=/5", "", "image=5,audio=/8")]


SIZES = {
    "vocab_size": len(tiny.TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "eos_token_id": tiny.TOKENIZER.eos_token_id,
    "pad_token_id": tiny.TOKENIZER.pad_token_id,
}
LLMS: dict[str, PreTrainedConfig] = {
    "llama": tiny.llm_config(tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES),
    "a sliding window shorter than the prompts": Gemma2Config(**SIZES, sliding_window=16),
}
ADAPTERS = {
    "none": None,
    "lora": LoraConfig(rank=4, alpha=8),
    "a bank by task": LoraBankConfig(variant="st", rank=4, alpha=8),
    "experts with a router per scale": MomeConfig(
        num_experts=5,
        top_k=2,
        bottleneck=4,
        disjoint_routers=True,
        scales=["audio=/4", "audio=/8", "video=/2", "video=/5", "audio=/4,video=/2", "audio=/8,video=/5"],
    ),
}


def build(config: ModelConfig, llm: PreTrainedConfig) -> ElasticForConditionalGeneration:
    """As `tiny.model`, on any LLM, and with an adapter that does something."""
    configs = tiny.encoder_configs()
    ids = {medium: tiny.TOKENIZER.convert_tokens_to_ids(PLACEHOLDER_TOKENS[medium]) for medium in config.media}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        parts = {medium: configs[medium] for medium in config.media}
        model = ElasticForConditionalGeneration(
            config_of_parts(config, text_config=llm, encoder_configs=parts, placeholder_ids=ids)
        )
        put_adapters(model, seed=1)
        for parameter in model.parameters():  # so that every layer matters and a random model has favourites
            if parameter.dim() > 1:
                parameter.data.mul_(4)
            if not parameter.any():
                parameter.data.normal_(std=0.1)
    return model.eval()


CLIP = [tiny.random_media("audio", 37), tiny.random_media("video", 19)]
OTHER = [tiny.random_media("audio", 41, seed=3), tiny.random_media("video", 22, seed=3)]
QUESTIONS = ("transcribe speech and video to text.", "what was said?", "what is the letter here?", "how many objects?")


def answers(answerer: Answerer, rows: list[Any], budgets: list[str]) -> list[list[Any]]:
    batch = tiny.batch(answerer.processor, rows)
    return answerer.answer_batch(batch, [[Budget.parse(budget)] * len(rows) for budget in budgets])


DECODERS = [LlamaConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config, Gemma3TextConfig]


def decoder(config_class: type = LlamaConfig) -> nn.Module:
    config = config_class(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if isinstance(config, Qwen3_5TextConfig):  # by default one layer in four has attention, and there are two here
        config.layer_types = ["linear_attention", "full_attention"]
    torch.manual_seed(0)
    llm = AutoModel.from_config(config)
    for parameter in llm.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return llm.eval()


def embeddings(rows: int = 3, seed: int = 2) -> Tensor:
    return torch.randn(rows, 7, 32, generator=torch.Generator().manual_seed(seed))
