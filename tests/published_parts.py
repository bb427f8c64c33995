"""Models of shipped run configs at real size, on the meta device, from the published values in tests/fixtures."""

import json
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from mllm.checkpoints.build import config_of_parts, put_adapters
from mllm.checkpoints.sources import resolve_source
from mllm.config.model import ModelConfig
from mllm.config.run import RunConfig, read_run_config
from mllm.model.modeling import ElasticForConditionalGeneration

ROOT = Path(__file__).parents[1]
LIKE = {"checkpoints/llava-v1.5-7b/llm": "vicuna-7b-v1.5"}
"""Parts that are converted checkpoints, and the part whose sizes they have."""


def read(path: Path) -> RunConfig:
    return read_run_config(yaml.safe_load(path.read_text()))


def part_config(reference: str) -> PreTrainedConfig:
    """Published values of a real part, kept in tests/fixtures; the synthetic parts are at hand."""
    if reference.startswith("synthetic:"):
        return AutoConfig.from_pretrained(resolve_source(reference))
    name = LIKE.get(reference) or Path(reference).name.lower()
    values = json.loads((ROOT / "tests" / "fixtures" / f"{name}.json").read_text())
    return AutoConfig.for_model(**values)


def build_on_meta(settings: ModelConfig) -> ElasticForConditionalGeneration:
    text = part_config(settings.llm)
    media = settings.encoded_media
    marks = [token for block in media.values() for token in block.span]
    if settings.llm.startswith("synthetic:"):
        marks = []  # its tokenizer knows them
    config = config_of_parts(
        settings,
        text_config=text,
        encoder_configs={medium: part_config(block.encoder.source) for medium, block in media.items()},
        placeholder_ids={medium: text.vocab_size + index for index, medium in enumerate(media)},
        new_tokens={token: text.vocab_size + len(media) + index for index, token in enumerate(marks)},
    )
    with torch.device("meta"):
        model = ElasticForConditionalGeneration(config)
        put_adapters(model)
    return model
