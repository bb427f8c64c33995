"""Settings of tiny models whose adapters know the rows."""

import dataclasses

import tiny

from mllm.config.model import LoraBankConfig, ModelConfig, MomeConfig
from mllm.config.run import SamplerConfig

SCALES = ["audio=/4", "audio=/8", "video=/2", "video=/5", *(f"audio=/{a},video=/{v}" for a in (4, 8) for v in (2, 5))]
ADAPTERS = {
    "mss": LoraBankConfig(variant="mss", rank=4, alpha=8, scales=SCALES),
    "st": LoraBankConfig(variant="st", rank=4, alpha=8),
    "mome": MomeConfig(num_experts=5, top_k=2, bottleneck=4, balance_weight=0.5),
}
ALL = SamplerConfig(mode="all")


def model_settings(name: str) -> ModelConfig:
    return dataclasses.replace(tiny.settings(("audio", "video")), adapter=ADAPTERS[name])
