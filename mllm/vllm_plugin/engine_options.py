"""Says what vLLM's engine is started with for an elastic model: the arguments of its engine, and its environment.

Knows numbers and words. Does not import vLLM.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Holds how an engine is started.

    Args:
        model: folder of an export.
        dtype: of the LLM and the encoders.
        data_parallel: engines that share the requests, each with the whole model.
        tensor_parallel: devices that share one LLM.
        max_prompts: answers that are written at once.
        max_tokens: longest prompt with its answer; as much as the LLM reads when None.
        max_media: items of each medium in one prompt.
    """

    model: str
    dtype: str = "float32"
    data_parallel: int = 1
    tensor_parallel: int = 1
    max_prompts: int = 32
    max_tokens: int | None = None
    max_media: int = 16

    def arguments(self, media: tuple[str, ...]) -> dict[str, Any]:
        """List the arguments of `vllm.AsyncEngineArgs`.

        Args:
            media: that the model takes.
        """
        return {
            "model": self.model,
            "dtype": self.dtype,
            "data_parallel_size": self.data_parallel,
            "tensor_parallel_size": self.tensor_parallel,
            "max_num_seqs": self.max_prompts,
            "max_model_len": self.max_tokens,
            "limit_mm_per_prompt": dict.fromkeys(media, self.max_media),
            "block_size": BLOCK_TOKENS,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "enable_log_requests": False,
        }


def environment(of: Mapping[str, str] = os.environ) -> dict[str, str]:
    """List what an engine's environment lacks."""
    return {name: value for name, value in ENVIRONMENT.items() if name not in of}


def check_export(model: str) -> None:
    """Refuse a folder that no engine reads.

    Raises:
        ValueError: a run, which has to be exported first.
        FileNotFoundError: no model at all.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no model")
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{model} is a run, and vLLM reads whole models: mllm export --model {model} --out {model}-exported, and "
            "serve that"
        )
