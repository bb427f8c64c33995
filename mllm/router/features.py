"""Describes a request by what is known before a budget is chosen: its question, and how large and noisy its media are.

Knows encoded rows and the LLM's embeddings of words. Does not know what the features are good for.

Nothing here looks at the encoders' outputs. So a budget is chosen on the host, before a request is batched, cached and
encoded, and the same whoever its batch mates are: rounding in a batch of encoders cannot tip a choice. The task of a
sample is no feature, since requests of users have none; the words of the question tell it.

Shapes: n tokens of a row, H the LLM's width.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from mllm.budget import MEDIA
from mllm.processing.batch import EncodedSample, MediaSpan
from mllm.router.table import Array

QUESTION, FACTS, NOISE = "question", "facts", "noise"
MediaSet = tuple[str, ...]
"""The media that a request holds, each once, in the order of `MEDIA`."""


def media_set_of(media: Collection[str]) -> MediaSet:
    """List media, each once, in the order of `MEDIA`."""
    return tuple(medium for medium in MEDIA if medium in media)


@torch.no_grad()
def features_of(model: Any, row: EncodedSample, placeholder_ids: Collection[int]) -> dict[str, Array]:
    """Describe one request.

    Args:
        model: an `ElasticForConditionalGeneration`; only its embeddings of tokens are used.
        row: as it is asked, without an answer.
        placeholder_ids: of all media, which are no words.

    Returns:
        By block: "question" (H,), the mean embedding of all words; "facts" (3 per medium), see `facts_of`; of requests
        with audio, "noise" (1,), the least estimated ratio of signal to noise in dB.
    """
    words = [token for token in row.ids if token not in placeholder_ids]
    ids = torch.tensor([words], dtype=torch.int64, device=model.device)
    embeddings = model.model.embed_text(ids)[0].double().cpu().numpy()
    features = {QUESTION: embeddings.mean(axis=0), FACTS: facts_of(row.spans)}
    ratios = [span.estimated_snr_db for span in row.spans if span.estimated_snr_db is not None]
    return features | ({NOISE: np.asarray([min(ratios)])} if ratios else {})


def facts_of(spans: Sequence[MediaSpan]) -> Array:
    """List, for each medium of a request, logarithms of its features, its items, and its pixels where they count."""
    facts: list[float] = []
    for medium in media_set_of([span.extent.medium for span in spans]):
        extents = [span.extent for span in spans if span.extent.medium == medium]
        features = sum(extent.length * extent.num_images for extent in extents)
        pixels = sum(extent.image_pixels[0] * extent.image_pixels[1] for extent in extents if extent.image_pixels)
        facts += [float(np.log2(1 + value)) for value in (features, len(extents), pixels)]
    return np.asarray(facts, float)
