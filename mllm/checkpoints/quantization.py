"""Says how bitsandbytes keeps the linear layers of a frozen LLM in 8 or 4 bits, and refuses it where it cannot.

Knows what transformers' loading takes for it. Does not know files or names of weights. Sources: LLM.int8() (arXiv
2208.07339), NF4 and double quantisation of QLoRA (arXiv 2305.14314).
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mllm.config.model import Int8Config, QuantizationConfig
from mllm.utils.extras import install_line

HEAD = "lm_head"
LIBRARY = "bitsandbytes"


def quantization_device() -> torch.device:
    """Return the GPU of this process.

    Raises:
        ValueError: there is none, the library is missing, or ZeRO-3 shards the LLM while it loads.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "model.quantization keeps weights in 8 or 4 bits by bitsandbytes on a GPU, and PyTorch sees none here; a "
            "model that was trained with it is not loaded without one"
        )
    if importlib.util.find_spec(LIBRARY) is None:
        raise ValueError(f"model.quantization needs {LIBRARY}: {install_line('quantization')}")
    if is_deepspeed_zero3_enabled():
        raise ValueError("model.quantization does not go with ZeRO-3, which shards weights as they are; use ZeRO-2")
    return torch.device("cuda", torch.cuda.current_device())


def bits_options(
    quantization: QuantizationConfig, *, dtype: torch.dtype, device: torch.device, kept: Sequence[str] = ()
) -> dict[str, Any]:
    """Make the options of `from_pretrained` that quantise linear layers while they load.

    The head, embeddings and norms stay in `dtype`, in which everything is computed.

    Args:
        device: where the weights are put, and quantised.
        kept: names of further modules that stay as they are, such as the encoder of a host.
    """
    skipped = [*kept, HEAD]
    if isinstance(quantization, Int8Config):
        bits = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=quantization.threshold, llm_int8_skip_modules=skipped
        )
    else:
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    return {"quantization_config": bits, "device_map": {"": device}}
