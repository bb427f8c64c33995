"""Reads captions as what shows projectors where to start: one medium item and the words about it per row.

Knows batches and tokens. Does not know what is made of them.

Shapes: N items, K soft tokens, D' what the compressor gives of each.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm.budget import Budget
from mllm.model.modeling import Features
from mllm.processing.batch import Batch, EncodedSample, Expanded
from mllm.processing.processor import ElasticProcessor


def check_captions(batch: Batch) -> None:
    """Refuse rows that are no captions.

    Raises:
        ValueError: the first such row, named.
    """
    for row in batch.rows:
        if len(row.spans) != 1:
            raise ValueError(
                f"sample {row.sample_id!r} of data.captions shows {len(row.spans)} media items; a caption has one"
            )
        span = row.spans[0]
        if span.extent.image_pixels is not None or span.encoder != span.extent.medium:
            raise ValueError(
                f"sample {row.sample_id!r} of data.captions is several encoded images (tiles or frames), and "
                "projectors are fitted to one; leave out data.captions"
            )


def only(batch: Batch, medium: str) -> Batch:
    """Keep the rows that show an item of a medium; the encoded items stay as they are."""
    return Batch([row for row in batch.rows if row.spans[0].extent.medium == medium], batch.values)


def meeting(batch: Batch, budgets: Sequence[Budget], processor: ElasticProcessor) -> Batch:
    """Keep the rows that can meet budgets; the encoded items stay as they are."""

    def meets(row: EncodedSample) -> bool:
        try:
            for budget in budgets:
                row.token_counts(budget, processor.space)
        except ValueError:  # too short for it: found and left out of training likewise, when it is loaded
            return False
        return True

    return Batch([row for row in batch.rows if meets(row)], batch.values)


def read_at(
    model: Any, processor: ElasticProcessor, batch: Batch, budget: Budget, medium: str, features: Features
) -> tuple[Expanded, Tensor, Tensor, Features]:
    """Expand rows to a budget; also return what the compressor gives (N, K, D'), counts (N,), and features."""
    expanded = processor.expand(batch, [[budget] * len(batch.rows)], left_padding=False)
    inputs = {name: value.to(features.values.device) for name, value in expanded.inputs.items()}
    index, counts = inputs.get(f"{medium}_index"), inputs[f"num_{medium}_tokens"]
    read = model.model.compress(
        medium,
        features,
        num_tokens=counts,
        rates=inputs.get(f"{medium}_rates"),
        index=index,
        max_tokens=inputs["input_ids"].shape[1],
    )
    shown = slice(len(counts)) if index is None else index
    return expanded, read, counts, Features(features.values[shown], features.lengths[shown])


def word_tokens(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Keep the tokens that are words or pieces of them, maybe some bytes of a letter.

    Punctuation and special tokens stand in every caption alike and say nothing about any medium.
    """

    def is_word(token: int) -> bool:
        text = tokenizer.decode([token], skip_special_tokens=True)
        return "\N{REPLACEMENT CHARACTER}" in text or any(map(str.isalnum, text))

    return {token for token in tokens if token >= 0 and is_word(token)}
