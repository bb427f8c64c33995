"""What the body and the whole of the elastic model share: their config class, and what transformers asks of its models.

Knows transformers' base class. Does not know parts, media or the forward pass.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from mllm.kv_cache.names import CACHE_NAMES
from mllm.model.configuration import ElasticConfig


class ElasticPreTrainedModel(PreTrainedModel):
    """What the two model classes share: the config class, and the initialisation of compressors."""

    config_class = ElasticConfig
    config: ElasticConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "video", "text")  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    # Of an export that is loaded in half precision; see `mllm.model.precision`.
    _keep_in_fp32_modules_strict = ["compressors", "newline", "new_tokens"]  # noqa: RUF012 (read by transformers)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012 (read by transformers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        is_ours = type(module).__module__.startswith(("mllm.compressors", "mllm.model.new_tokens"))
        if is_ours and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
