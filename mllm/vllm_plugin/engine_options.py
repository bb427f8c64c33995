"""Says what vLLM's engine is started with for an elastic model: the arguments of its engine, and its environment.

Knows numbers, words and the files of exports. Does not import vLLM.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mllm.checkpoints.auto_classes import register
from mllm.checkpoints.expert_folders import ExpertFolders, read_experts
from mllm.media import MediaLimits
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""GiB of the key-value cache on a CPU, threads that are not bound to cores which others use too, no network, and no
reports of usage; what the environment says already stays."""
BLOCK_TOKENS = 32
"""Tokens of a block of the key-value cache. Only whole blocks are found again, and on a CPU vLLM's own are so long that
short prompts never are."""


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM sets memory aside for."""
MOST_LORAS = 8
"""LoRAs of one step; prompts that need another one wait for the next."""
LEAST_BATCH_TOKENS = 2_048
"""What vLLM reads of prompts in one step at the least."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Holds how an engine is started.

    Args:
        model: folder of an export.
        dtype: of the LLM and the encoders.
        data_parallel: engines that share the requests, each with the whole model.
        tensor_parallel: devices that share one LLM.
        max_prompts: answers that are written at once.
        max_prompt_tokens: longest prompt, soft tokens included; what the LLM reads counts too.
        max_new_tokens: longest answer.
        max_media: items of each medium in one prompt.
        cache_gib: memory for media that were prepared before.
        threads: CPU threads of each of its processes; see `environment`.
        experts: LoRAs of which each prompt is given one.
        is_eager: runs the LLM as it is written. Compiling it takes minutes, and on a CPU it is hardly faster then.
    """

    model: str
    dtype: str = "float32"
    data_parallel: int = 1
    tensor_parallel: int = 1
    max_prompts: int = 32
    max_prompt_tokens: int = 32_768
    max_new_tokens: int = 256
    max_media: int = 16
    cache_gib: float = 0.25
    is_eager: bool = False
    threads: int | None = None
    experts: ExpertFolders | None = None

    def arguments(self, media: Sequence[str], context_tokens: int | None) -> dict[str, Any]:
        """List the arguments of `vllm.AsyncEngineArgs`.

        Args:
            media: that the model takes.
            context_tokens: what the LLM reads.

        Raises:
            ValueError: experts of a rank that vLLM does not take.
        """
        longest = min(self.max_prompt_tokens, context_tokens or self.max_prompt_tokens)
        return {
            "model": self.model,
            "dtype": self.dtype,
            "data_parallel_size": self.data_parallel,
            "tensor_parallel_size": self.tensor_parallel,
            "max_num_seqs": self.max_prompts,
            "max_model_len": min(longest + self.max_new_tokens, context_tokens or longest + self.max_new_tokens),
            "mm_processor_cache_gb": self.cache_gib,
            # An item that gives more soft tokens than one step reads is refused, and nothing else says how long it is.
            "max_num_batched_tokens": max(longest, self.max_prompts, LEAST_BATCH_TOKENS),
            "limit_mm_per_prompt": dict.fromkeys(media, self.max_media),
            # One engine on one device needs no process beside its own.
            "distributed_executor_backend": "uni" if self.tensor_parallel == self.data_parallel == 1 else "mp",
            "enforce_eager": self.is_eager,
            "block_size": BLOCK_TOKENS,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "enable_log_requests": False,
            **self._experts(),
        }

    def _experts(self) -> dict[str, Any]:
        if self.experts is None:
            return {}
        rank, number = self.experts.rank, len(self.experts.folders)
        if rank > LORA_RANKS[-1]:
            raise ValueError(f"{self.model} has LoRAs of rank {rank}, and vLLM takes at most {LORA_RANKS[-1]}")
        return {
            "enable_lora": True,
            "max_lora_rank": next(size for size in LORA_RANKS if size >= rank),
            "max_loras": min(number, MOST_LORAS),
            "max_cpu_loras": max(number, MOST_LORAS),
        }


def environment(threads: int | None = None, current: Mapping[str, str] = os.environ) -> dict[str, str]:
    """List what an engine's environment lacks.

    Args:
        threads: CPU threads of each of its processes; what the environment says, or one, when None.
    """
    lacking = {name: value for name, value in ENVIRONMENT.items() if name not in current}
    return lacking if threads is None else {**lacking, "OMP_NUM_THREADS": str(threads)}


def check_export(model: str) -> None:
    """Refuse a folder that no engine reads.

    Raises:
        ValueError: a run, which has to be exported first.
        FileNotFoundError: no model at all.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no model; vLLM serves what mllm export wrote")
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{model} is a run, and vLLM reads whole models: mllm export --model {model} --out {model}-exported, and "
            "serve that"
        )


def model_without_weights(
    folder: str, *, limits: MediaLimits
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Load an export's processor, and its model without the weights, which an engine has: it knows sizes and ends."""
    register()
    config = ElasticConfig.from_pretrained(folder)
    processor = ElasticProcessor.from_pretrained(folder, elastic_config=config, trust_remote_code=False)
    processor.limits = limits
    experts = read_experts(folder)
    if experts is not None:  # so that a prompt without an expert is refused when it is prepared
        processor.expert_names = experts.names
    with torch.device("meta"):
        model = ElasticForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), processor
