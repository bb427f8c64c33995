"""Holds what a processor keeps beside its tokenizer, in `processor_config.json`: what the model does not need.

The media, their budgets and the adapter's names stand in the model's `config.json`, and nowhere else.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """Says how conversations become text, and how files become what encoders take."""

    chat_format: str = "chat"
    """Makes text of a conversation; see `ModelConfig`."""
    preprocessors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Holds, by medium, the image processor or feature extractor that came with the encoder, as plain values."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Holds what is asked about media, such as `audio+video`, when nothing is."""
    shares_lengths: bool = False
    """Counts every clip of a batch as long as the longest and masks no training row, as the released AVSR code does."""
    host: dict[str, Any] | None = None
    """Holds the processor of a host, as plain values, which decides all of the others; left out where there is none."""
    names_images: bool = False
    """Numbers the images of a conversation in the text."""
