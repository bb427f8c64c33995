"""Fits the projectors of a toy model to captions."""

from typing import Any

import tiny
from torch.utils.data import DataLoader

from mllm.config.model import ModelConfig
from mllm.training.initialization.projector_fit import Fit, fit_projectors

WORDS = ["red circle", "the blue square", "a cat; on the mat.", "two", "left of the cat", "green and white", "no cross"]


def fit(
    settings: ModelConfig,
    media: list[str],
    *,
    batch_size: int = 3,
    rows: range = range(14),
    rank: int = 0,
    world: int = 1,
) -> tuple[Any, list[Fit]]:
    """Fit a toy model to captions of random media; row i shows the kind `media[i % len]`."""
    model, processor = tiny.model(settings), tiny.processor(settings)
    pairs = [([tiny.random_media(media[i % len(media)], 20 + i, seed=i)], WORDS[i % 7]) for i in rows]
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    made = [{"batch": tiny.batch(processor, batch, for_training=True)} for batch in batches[rank::world]]
    loader: Any = DataLoader(made, batch_size=None)  # pyright: ignore[reportArgumentType]
    return model, fit_projectors(model, processor, loader, num_counted=len(made))
