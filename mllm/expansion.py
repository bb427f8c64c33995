"""From encoded conversations and budgets to the inputs of one forward pass.

Knows rows, extents and budgets; decides how many placeholders each run gets and which encoded item it shows.
Does not know files, tokenizers or the model. Everything here happens on the host, before the transfer.

Shapes: B rows, S positions, R placeholder runs, P target tokens. With several budgets per row the rows stand budget by
budget: row `d * B + b` is row b at budget d.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllm.adapters.members import NO_MEMBERS, NOBODY, Members
from mllm.budget import MEDIA, Budget, Cost, Extent, Space, count_tokens
from mllm.splice import IGNORED_LABEL, expand_placeholders, pad_rows


@dataclass(frozen=True)
class Run:
    """One placeholder of a row: what is known of its medium, and which encoded item of the batch it shows."""

    extent: Extent
    item: int


@dataclass(frozen=True)
class Row:
    """One conversation with a single placeholder id per medium, its media in order of appearance, and its task."""

    sample_id: str
    ids: Sequence[int]
    labels: Sequence[int]
    runs: tuple[Run, ...] = ()
    task: str = ""

    def costs(self, budget: Budget, space: Space) -> list[Cost]:
        """What each medium of this row costs at a budget.

        Raises:
            ValueError: the budget cannot be met; the sample is named.
        """
        named = {run.extent.medium for run in self.runs}
        amounts = {m: a for m, a in budget.amounts.items() if m in named or m not in space.media}
        fitting = Budget(amounts, budget.total_tokens)
        try:
            return count_tokens([run.extent for run in self.runs], fitting, space)
        except ValueError as error:
            raise ValueError(f"sample {self.sample_id!r}: {error}") from error


@dataclass(frozen=True)
class Batch:
    """Rows and the encoder inputs of their media: `pixel_values`, `audio_values`, `audio_lengths`, ..."""

    rows: Sequence[Row]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def media(self) -> set[str]:
        """Media that occur in the batch."""
        return {run.extent.medium for row in self.rows for run in row.runs}


@dataclass(frozen=True)
class Targets:
    """Where a training pass needs logits, flat over (B, S), and what they should say.

    positions, ids, rows: (P,) int64; `rows` says which row of the expanded batch each target belongs to.
    """

    positions: Tensor
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Expanded:
    """The inputs of one forward pass, and what each row of it cost."""

    inputs: dict[str, Tensor]
    labels: Tensor
    costs: list[list[Cost]]

    def targets(self) -> Targets:
        """Positions whose next token is to be learned; the head runs there and nowhere else."""
        rows, columns = torch.nonzero(self.labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
        return Targets(rows * self.labels.shape[1] + columns, self.labels[rows, columns + 1], rows)


def expand(
    batch: Batch,
    budgets: Sequence[Sequence[Budget]],
    *,
    space: Space,
    placeholder_ids: Mapping[str, int],
    pad_id: int,
    left_padding: bool,
    members: Members = NO_MEMBERS,
) -> Expanded:
    """Expand a batch to one or more budgets per row.

    Args:
        batch: rows with single placeholders.
        budgets: per draw, one budget per row. A budget may name media a row does not hold.
        placeholder_ids: by medium.
        left_padding: prompts are padded on the left, training rows on the right.
        members: scales and tasks of the adapter; rows then get `scale_ids` and `task_ids` (B,).

    Raises:
        ValueError: a budget a row cannot meet, or placeholders that do not match the media, or a scale or task that
            the adapter has no member for; the sample is named.
    """
    placeholders = frozenset(placeholder_ids.values())
    ids, labels, costs, runs, scale_ids, task_ids = [], [], [], [], [], []
    for row, budget in ((r, b) for draw in budgets for r, b in zip(batch.rows, draw, strict=True)):
        spent = row.costs(budget, space)
        row_ids, row_labels = expand_placeholders(
            row.ids, row.labels, placeholders, [cost.tokens for cost in spent], row.sample_id
        )
        ids.append(row_ids)
        labels.append(row_labels)
        costs.append(spent)
        runs += list(zip(row.runs, spent, strict=True))
        own_ids = _member_ids(row, spent, members)
        scale_ids.append(own_ids[0])
        task_ids.append(own_ids[1])
    inputs = {
        "input_ids": pad_rows(ids, pad_id, left=left_padding),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, left=left_padding),
        **batch.values,
        **_media_inputs(runs),
        **({"scale_ids": torch.tensor(scale_ids)} if members.scales else {}),
        **({"task_ids": torch.tensor(task_ids)} if members.tasks else {}),
    }
    return Expanded(inputs, pad_rows(labels, IGNORED_LABEL, left=left_padding), costs)


def _member_ids(row: Row, costs: Sequence[Cost], members: Members) -> tuple[int, int]:
    media = [run.extent.medium for run in row.runs]
    try:
        scale_id = members.scale_id(list(zip(media, costs, strict=True))) if members.scales else NOBODY
        task_id = members.task_id(row.task, media) if members.tasks else NOBODY
    except ValueError as error:
        raise ValueError(f"sample {row.sample_id!r}: {error}") from error
    return scale_id, task_id


def _media_inputs(runs: Sequence[tuple[Run, Cost]]) -> dict[str, Tensor]:
    """Counts, rates and items of each medium's runs; the items are left out where run i simply shows item i."""
    inputs: dict[str, Tensor] = {}
    for medium in MEDIA:
        own = [(run.item, cost) for run, cost in runs if run.extent.medium == medium]
        if not own:
            continue
        inputs[f"num_{medium}_tokens"] = torch.tensor([cost.tokens for _, cost in own])
        if medium != "image":
            inputs[f"{medium}_rates"] = torch.tensor([cost.rate for _, cost in own])
        items = [item for item, _ in own]
        if items != list(range(len(items))):
            inputs[f"{medium}_index"] = torch.tensor(items)
    return inputs


def with_items(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, with the item of every run said."""
    counts = {m: inputs[f"num_{m}_tokens"] for m in MEDIA if f"num_{m}_tokens" in inputs}
    return {f"{medium}_index": torch.arange(len(own)) for medium, own in counts.items()} | dict(inputs)
