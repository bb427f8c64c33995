"""Expands the single placeholder id of each medium into the span of its soft tokens, and pads rows of ids.

Knows ids and counts. Does not know media, budgets or what an id means; the model puts soft tokens where the spans are
(`mllm.model.splice`).

Shapes: B rows, S positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Marks a position that no loss is computed for, as PyTorch and transformers do."""


def expand_placeholders(
    ids: Sequence[int], labels: Sequence[int], placeholders: frozenset[int], counts: Sequence[int], sample_id: str = ""
) -> tuple[list[int], list[int]]:
    """Turn each single placeholder of a prompt into the span of its soft tokens. The only place where spans are made.

    Args:
        ids: token ids of one row with one placeholder id per medium item.
        labels: one label per id; a span is never a target.
        placeholders: the placeholder ids of all media.
        counts: soft tokens of each item, in order of appearance.
        sample_id: named in the error.

    Raises:
        ValueError: as many placeholders as counts are needed; both numbers and the sample are named.
    """
    num_placeholders = sum(token in placeholders for token in ids)
    if num_placeholders != len(counts):
        raise ValueError(
            f"sample {sample_id!r} has {num_placeholders} media placeholders in its text for {len(counts)} media items"
        )
    remaining = iter(counts)
    expanded_ids: list[int] = []
    expanded_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        if token in placeholders:
            count = next(remaining)
            # Every position keeps the id of its medium, so the model finds spans by comparing ids, without lengths.
            expanded_ids += [token] * count
            expanded_labels += [IGNORED_LABEL] * count
        else:
            expanded_ids.append(token)
            expanded_labels.append(label)
    return expanded_ids, expanded_labels


def pad_rows(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> Tensor:
    """Stack rows of ids to one (B, S) int64 tensor. Prompts are padded on the left, training rows on the right."""
    longest = max(len(row) for row in rows)
    padded = [
        [fill] * (longest - len(row)) + list(row) if left else [*row, *[fill] * (longest - len(row))] for row in rows
    ]
    return torch.tensor(padded, dtype=torch.int64)
