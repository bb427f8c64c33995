"""From the padded rows of a training pass to one packed row: which tokens are the same, which soft token goes where.

Knows expanded rows, placeholders and how budgets of a medium are nested. Does not know the model, losses or draws.
Everything here happens on the host, before the transfer.

Two soft tokens are the same if they are of the same encoded item and, for a compressor whose budgets are prefixes of
each other, the same one of it; for every other compressor the budget must be the same too. Rows that are served by
different experts of an adapter share nothing.

Shapes: B rows, S positions, R placeholder runs, L tokens of the packed row, K soft tokens of the longest run.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mllm.budget import MEDIA, MediumSpace, Space
from mllm.packing.plan import SegmentPlan, plan_rows

MEMBER_KEYS = ("scale_ids", "task_ids")
# A key of a soft token holds its medium, item, budget and number; all are above every id of text.
_MEDIUM, _ITEM, _BUDGET, _SOFT = 56, 36, 20, 1 << 60


def pack(
    inputs: Mapping[str, Tensor], *, space: Space, placeholder_ids: Mapping[str, int]
) -> tuple[dict[str, Tensor], SegmentPlan]:
    """Pack the inputs of a forward pass.

    Args:
        inputs: as `expand` gives them, padded on the right.

    Returns:
        The inputs of the packed pass: `input_ids` (1, L), ids of experts (1, L), and the media with the runs that are
        still needed; and the plan, which the model takes beside them.
    """
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy() != 0
    keys = ids.astype(np.int64)
    runs = {
        medium: _Runs(space.media[medium], inputs, (ids == placeholder_ids[medium]) & mask)
        for medium in _present(inputs)
    }
    for own in runs.values():
        keys[own.where] = own.keys()
    lengths = mask.sum(axis=1)
    members = [inputs[key].tolist() for key in MEMBER_KEYS if key in inputs]
    groups = list(zip(*members, strict=True)) if members else []
    plan = plan_rows([row[:length].tolist() for row, length in zip(keys, lengths, strict=True)], groups)
    row_of, column_of = plan.maker.numpy(), plan.position_ids[0].numpy()
    packed = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", *MEMBER_KEYS)}
    packed["input_ids"] = torch.from_numpy(ids[row_of, column_of])[None]
    packed |= {key: inputs[key][plan.maker][None] for key in MEMBER_KEYS if key in inputs}
    for medium, own in runs.items():
        is_soft = own.where[row_of, column_of]
        packed.pop(f"{medium}_layout", None)
        needed, plan.groups[medium], plan.layouts[medium] = own.needed(row_of[is_soft], column_of[is_soft])
        packed |= needed
    return packed, plan


class _Runs:
    """The runs of one medium in all rows.

    where: (B, S) bool, its placeholders. run, offset: (B, S) int64, which run a placeholder is of, -1 for a newline,
    and which token of it; meaningless elsewhere.
    """

    def __init__(self, space: MediumSpace, inputs: Mapping[str, Tensor], where: np.ndarray) -> None:
        self.space, self.medium, self.where = space, space.medium, where
        medium = space.medium
        self.counts = inputs[f"num_{medium}_tokens"].numpy()
        self.rates = inputs[f"{medium}_rates"].numpy() if f"{medium}_rates" in inputs else np.zeros_like(self.counts)
        items = inputs.get(f"{medium}_index")
        self.items = np.arange(len(self.counts)) if items is None else items.numpy()
        self.run, self.offset = np.zeros(where.shape, dtype=np.int64), np.zeros(where.shape, dtype=np.int64)
        if (layout := inputs.get(f"{medium}_layout")) is None:
            ends = self.counts.cumsum()
            number = np.arange(where.sum())
            run = np.searchsorted(ends, number, side="right")
            offset = number - (ends - self.counts)[run]
        else:
            run, offset = layout.numpy().T
        if _is_prefix(space):  # any run of an item holds the tokens of its smaller ones
            largest = _largest_of_item(self.items, self.counts)
            run = np.where(run < 0, run, largest[run])
        self.run[where], self.offset[where] = run, offset

    def keys(self) -> np.ndarray:
        """Of all placeholders in order: equal where the soft tokens are equal."""
        run, offset = self.run[self.where], self.offset[self.where]
        budget = np.unique(np.stack([self.counts, self.rates]), axis=1, return_inverse=True)[1].reshape(-1)[run]
        if _is_prefix(self.space):
            budget = np.zeros_like(budget)
        elif self.space.compressor == "query":  # of each window the first queries
            per_window = self.space.window_frames // np.maximum(self.rates[run], 1)
            budget = np.zeros_like(budget)
            offset = offset // per_window * self.space.max_tokens + offset % per_window
        medium = _SOFT | MEDIA.index(self.medium) << _MEDIUM
        token = medium | self.items[run] << _ITEM | (budget + 1) << _BUDGET | offset
        return np.where(run < 0, medium, token)  # all newlines are one

    def needed(self, rows: np.ndarray, columns: np.ndarray) -> tuple[dict[str, Tensor], list[tuple[int, int]], Tensor]:
        """The runs that the soft tokens there are taken from, longest first: model inputs, groups, layout."""
        run, offset = self.run[rows, columns], self.offset[rows, columns]
        kept = np.unique(run[run >= 0])
        kept = kept[np.argsort(-self.counts[kept], kind="stable")]
        place = np.full(len(self.counts), -1)
        place[kept] = np.arange(len(kept))
        own = np.where(run < 0, -1, place[run])
        groups = _groups(self.counts[kept])
        needed = {f"num_{self.medium}_tokens": self.counts[kept]}
        if self.medium != "image":
            needed[f"{self.medium}_rates"] = self.rates[kept]
        needed[f"{self.medium}_index"] = self.items[kept]
        tensors = {key: torch.from_numpy(value) for key, value in needed.items()}
        return tensors, groups, torch.from_numpy(np.stack([own, offset], axis=1))


def _groups(counts: np.ndarray) -> list[tuple[int, int]]:
    """Falling counts in stretches of which none is padded to more than twice its length: sizes and longest."""
    groups: list[tuple[int, int]] = []
    for count in counts.tolist():
        if not groups or 2 * count <= groups[-1][1]:
            groups.append((0, count))
        groups[-1] = (groups[-1][0] + 1, groups[-1][1])
    return groups


def _is_prefix(space: MediumSpace) -> bool:
    """Whether the tokens of a smaller budget are the first ones of a larger."""
    return space.order == "haar" or (space.compressor == "query" and not space.window_frames)


def _largest_of_item(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For every run the run of the same item that has most tokens."""
    by_count = np.lexsort((counts, items))
    ends = np.searchsorted(items[by_count], items, side="right") - 1
    return by_count[ends]


def _present(inputs: Mapping[str, Tensor]) -> list[str]:
    return [medium for medium in MEDIA if f"num_{medium}_tokens" in inputs]


def packed_targets(plan: SegmentPlan, positions: Tensor) -> Tensor:
    """Flat positions in the padded rows (B * S) -> places in the packed row."""
    return plan.rows.flatten()[positions]
