"""Packs the padded rows of a training batch into one row: finds which tokens are the same, which soft token goes where.

Knows expanded rows, placeholders and how budgets of a medium are nested. Does not know the model, losses or sampling.
Everything here happens on the host, before the transfer.

Two soft tokens are the same if they are of the same encoded item and, for a compressor whose budgets are prefixes of
each other, the same one of it; for every other compressor the budget must be the same too. Rows that are served by
different experts of an adapter share nothing.

Shapes: B rows, S positions, R spans of placeholders, L tokens of the packed row, P placeholders of a medium.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mllm.budget import MEDIA, MediumSpace, Space
from mllm.packing.plan import SegmentPlan, plan_rows

EXPERT_KEYS = ("scale_ids", "task_ids")
# A key of a soft token holds its medium, item, budget and number in these bits; all are above every id of text.
_MEDIUM_SHIFT, _ITEM_SHIFT, _BUDGET_SHIFT, _IS_SOFT = 56, 36, 20, 1 << 60


def pack(
    inputs: Mapping[str, Tensor], *, space: Space, placeholder_ids: Mapping[str, int]
) -> tuple[dict[str, Tensor], SegmentPlan]:
    """Pack the inputs of a forward pass.

    Args:
        inputs: as `expand` gives them, padded on the right.

    Returns:
        The inputs of the packed row: `input_ids` (1, L), ids of experts (1, L), and the media with the spans that are
        still needed; and the plan, which the model takes beside them.
    """
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy() != 0
    # A text token's key is its id. All soft tokens have the same id, the placeholder, so they get keys of their own.
    keys = ids.astype(np.int64)
    spans = {
        medium: _Spans(space.media[medium], inputs, (ids == placeholder_ids[medium]) & mask)
        for medium in _present(inputs)
    }
    for of_medium in spans.values():
        keys[of_medium.is_placeholder] = of_medium.keys()
    lengths = mask.sum(axis=1)
    experts = [inputs[key].tolist() for key in EXPERT_KEYS if key in inputs]
    groups = list(zip(*experts, strict=True)) if experts else []
    plan = plan_rows([row[:length].tolist() for row, length in zip(keys, lengths, strict=True)], groups)
    # Where each packed token stood: the row that it was placed for, at its position in that row.
    row_of, column_of = plan.source_rows.numpy(), plan.position_ids[0].numpy()
    packed = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", *EXPERT_KEYS)}
    packed["input_ids"] = torch.from_numpy(ids[row_of, column_of])[None]
    packed |= {key: inputs[key][plan.source_rows][None] for key in EXPERT_KEYS if key in inputs}
    for medium, of_medium in spans.items():
        is_soft = of_medium.is_placeholder[row_of, column_of]
        packed.pop(f"{medium}_layout", None)  # the plan has one for the packed row
        needed, plan.groups[medium], plan.layouts[medium] = of_medium.needed(row_of[is_soft], column_of[is_soft])
        packed |= needed
    return packed, plan


class _Spans:
    """Finds for every placeholder of one medium, in all rows, its span and its number in that.

    Args:
        space: budgets and compressor of the medium.
        inputs: as `pack` takes them.
        is_placeholder: (B, S) bool.
    """

    def __init__(self, space: MediumSpace, inputs: Mapping[str, Tensor], is_placeholder: np.ndarray) -> None:
        self.space, self.medium, self.is_placeholder = space, space.medium, is_placeholder
        medium = space.medium
        self.counts = inputs[f"num_{medium}_tokens"].numpy()
        self.rates = inputs[f"{medium}_rates"].numpy() if f"{medium}_rates" in inputs else np.zeros_like(self.counts)
        items = inputs.get(f"{medium}_index")
        self.items = np.arange(len(self.counts)) if items is None else items.numpy()
        if (layout := inputs.get(f"{medium}_layout")) is None:
            # Spans follow each other row by row, so a placeholder's number tells its span.
            ends = self.counts.cumsum()
            number = np.arange(is_placeholder.sum())
            span = np.searchsorted(ends, number, side="right")
            offset = number - (ends - self.counts)[span]
        else:
            span, offset = layout.numpy().T
        if _is_prefix(space):
            # Any span of an item holds the tokens of its smaller ones: all are taken from the largest, so are equal.
            span = np.where(span < 0, span, _largest_of_item(self.items, self.counts)[span])
        # (B, S), -1 for the span of a newline; meaningless where there is no placeholder.
        self.span = np.zeros(is_placeholder.shape, dtype=np.int64)
        self.offset = np.zeros(is_placeholder.shape, dtype=np.int64)
        self.span[is_placeholder], self.offset[is_placeholder] = span, offset

    def keys(self) -> np.ndarray:
        """Give every placeholder (P,) in order a key, equal where the soft tokens are equal."""
        span, offset = self.span[self.is_placeholder], self.offset[self.is_placeholder]
        budgets = np.stack([self.counts, self.rates])
        budget = np.unique(budgets, axis=1, return_inverse=True)[1].reshape(-1)[span]
        if _is_prefix(self.space):
            budget = np.zeros_like(budget)
        elif self.space.compressor == "query":
            # A smaller budget has the first queries of each window: number them by window and query, at any budget.
            per_window = self.space.window_frames // np.maximum(self.rates[span], 1)
            budget = np.zeros_like(budget)
            offset = offset // per_window * self.space.max_tokens + offset % per_window
        medium = _IS_SOFT | MEDIA.index(self.medium) << _MEDIUM_SHIFT
        token = medium | self.items[span] << _ITEM_SHIFT | (budget + 1) << _BUDGET_SHIFT | offset
        return np.where(span < 0, medium, token)  # all newlines are one, and no token has budget 0

    def needed(self, rows: np.ndarray, columns: np.ndarray) -> tuple[dict[str, Tensor], list[tuple[int, int]], Tensor]:
        """Keep the spans that soft tokens are taken from, longest first, and renumber those of the tokens.

        Args:
            rows, columns: (n,) where the soft tokens that are kept stand in the padded rows.

        Returns:
            Model inputs of the spans, their groups (see `SegmentPlan`), and the layout (n, 2) of the soft tokens.
        """
        span, offset = self.span[rows, columns], self.offset[rows, columns]
        kept = np.unique(span[span >= 0])
        kept = kept[np.argsort(-self.counts[kept], kind="stable")]
        new_number = np.full(len(self.counts), -1)
        new_number[kept] = np.arange(len(kept))
        renumbered = np.where(span < 0, -1, new_number[span])
        needed = {f"num_{self.medium}_tokens": self.counts[kept]}
        if self.medium != "image":
            needed[f"{self.medium}_rates"] = self.rates[kept]
        needed[f"{self.medium}_index"] = self.items[kept]
        tensors = {key: torch.from_numpy(value) for key, value in needed.items()}
        return tensors, _groups(self.counts[kept]), torch.from_numpy(np.stack([renumbered, offset], axis=1))


def _groups(counts: np.ndarray) -> list[tuple[int, int]]:
    """Split falling counts into stretches none of which is padded to more than twice a length: sizes and longest."""
    groups: list[tuple[int, int]] = []
    for count in counts.tolist():
        if not groups or 2 * count <= groups[-1][1]:
            groups.append((0, count))
        groups[-1] = (groups[-1][0] + 1, groups[-1][1])
    return groups


def _is_prefix(space: MediumSpace) -> bool:
    """Tell whether the tokens of a smaller budget are the first ones of a larger."""
    return space.order == "haar" or (space.compressor == "query" and not space.window_frames)


def _largest_of_item(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Find for every span the span of the same item that has most tokens."""
    by_count = np.lexsort((counts, items))
    ends = np.searchsorted(items[by_count], items, side="right") - 1
    return by_count[ends]


def _present(inputs: Mapping[str, Tensor]) -> list[str]:
    return [medium for medium in MEDIA if f"num_{medium}_tokens" in inputs]


def packed_targets(plan: SegmentPlan, positions: Tensor) -> Tensor:
    """Find flat positions in the padded rows (B * S) in the packed row."""
    return plan.rows.flatten()[positions]
