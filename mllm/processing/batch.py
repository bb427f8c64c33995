"""Expands encoded conversations at given budgets to the inputs of one forward pass.

Knows rows, extents and budgets; decides how many placeholders each span gets and which encoded item it shows.
Does not know files, tokenizers or the model. Everything here happens on the host, before the transfer.

Shapes: B rows, S positions, R spans of placeholders, P target tokens, G groups of rows. With several budgets per row
the rows stand budget by budget: row `d * B + b` is row b at budget d.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mllm.adapters.expert_ids import NO_EXPERT, NO_EXPERT_NAMES, ExpertNames
from mllm.budget import MEDIA, Budget, Extent, Space, TokenCount, count_tokens
from mllm.budget.tiling import Size, Tiles
from mllm.hosts.rows import in_rows
from mllm.kv_cache.shared_prefix import group_rows
from mllm.packing.plan import LEAST_SHARED
from mllm.processing.media_inputs import HostView
from mllm.processing.placeholders import IGNORED_LABEL, expand_placeholders, pad_rows
from mllm.processing.token_order import NEWLINE, order_of, shown_items


@dataclass(frozen=True)
class MediaSpan:
    """Describes one placeholder of a row: what is known of its medium, and which encoded item of the batch it shows.

    Where the medium is several encoded images, `item` is the first of them; `tilings` are the cuts that an image was
    encoded in, one for each of `views` where there are such. `encoded_as` names the medium whose encoder is used where
    it is another one's. `views` say how the prompt of a host shows it, and in which resolutions an image was encoded.
    `estimated_snr_db` says how noisy audio sounds.
    """

    extent: Extent
    item: int
    tilings: tuple[Tiles, ...] = ()
    encoded_as: str = ""
    views: tuple[HostView, ...] = ()
    estimated_snr_db: float | None = None

    @property
    def encoder(self) -> str:
        """Return the medium whose encoder its items went through."""
        return self.encoded_as or self.extent.medium

    def grid_of(self, count: TokenCount) -> Size | None:
        """Return the rows and columns of its features at a count, where it is an image."""
        resolution = count.resolution
        return self.extent.grid if resolution is None or resolution.grid is None else resolution.grid

    def num_features(self, count: TokenCount) -> int:
        """Count the features of each of its encoded items that it shows at a count."""
        grid = self.grid_of(count)
        return self.extent.length if grid is None else grid[0] * grid[1]

    def num_tags(self, count: TokenCount) -> int:
        """Count the tokens of text that a host puts between and around its soft tokens.

        Raises:
            ValueError: as `view_of`.
        """
        view = self.view_of(count)
        return 0 if view is None else view.num_tags(count.tokens, self.grid_of(count))

    def most_tags(self, count: TokenCount) -> int:
        """Count them at the resolution, of those it was encoded at, that has the most."""
        return max((view.num_tags(count.tokens, self.extent.grid) for view in self.views), default=0)

    def view_of(self, count: TokenCount) -> HostView | None:
        """Return how a host's prompt shows it at a count; None without a host.

        Raises:
            ValueError: an image that was not encoded at the resolution of the count.
        """
        return self.views[self._number_of(count)] if self.views else None

    def shown(self, count: TokenCount, placeholders: frozenset[int]) -> tuple[list[int], list[int]]:
        """Return the ids that stand for it in the text of a host, and the soft tokens of each placeholder among them.

        Raises:
            ValueError: as `view_of`.
        """
        view, grid = self.views[self._number_of(count)], self.grid_of(count)
        ids: list[int] = []
        counts: list[int] = []
        for token in view.ids:
            if token not in placeholders:
                ids.append(token)
            elif view.breaks is None:
                ids.append(token)
                counts.append(count.tokens if count.tiles is not None else count.each or count.tokens)
            else:
                assert grid is not None
                rows, sizes = in_rows(token, grid, count.tokens, view.breaks)
                ids += rows
                counts += sizes
        return ids, counts

    def items_of(self, count: TokenCount) -> list[int]:
        """List the encoded items of the batch that it shows at a count.

        Raises:
            ValueError: as `view_of`, or an image that was not cut as the count wants it.
        """
        if not self.views:
            return [self.item + number for number in shown_items(self.extent, count, self.tilings)]
        number = self._number_of(count)
        first = self.item + sum(view.num_items for view in self.views[:number])
        return [first + item for item in shown_items(self.extent, count, self.tilings[number : number + 1])]

    def _number_of(self, count: TokenCount) -> int:
        resolutions = [view.resolution for view in self.views]
        if count.resolution not in resolutions:
            loaded = ", ".join("its own" if one is None else f"{one.tokens} tokens" for one in resolutions)
            wanted = "its own" if count.resolution is None else f"{count.resolution.tokens} tokens"
            raise ValueError(
                f"the image was loaded at a resolution of {loaded}, and its budget wants {wanted}: load media with the "
                "budgets they are asked at"
            )
        return resolutions.index(count.resolution)


@dataclass
class LaidOut:
    """Holds the ids of a row with every tag, its labels, and the soft tokens of each placeholder in turn."""

    ids: Sequence[int]
    labels: Sequence[int]
    counts: list[int]


@dataclass(frozen=True)
class EncodedSample:
    """Holds a conversation with a single placeholder id per medium, its media in order of appearance, and its task."""

    sample_id: str
    ids: Sequence[int]
    labels: Sequence[int]
    spans: tuple[MediaSpan, ...] = ()
    task: str = ""

    def token_counts(self, budget: Budget, space: Space) -> list[TokenCount]:
        """Count what each medium of this row costs at a budget.

        Raises:
            ValueError: the budget cannot be met; the sample is named.
        """
        named = {span.extent.medium for span in self.spans}
        fitting = budget.only(named | (budget.media - set(space.media)))
        try:
            return count_tokens([span.extent for span in self.spans], fitting, space)
        except ValueError as error:
            raise ValueError(f"sample {self.sample_id!r}: {error}") from error

    def laid_out(self, counts: Sequence[TokenCount], placeholders: frozenset[int]) -> "LaidOut":
        """Put the tags of media around their placeholders, and say how many soft tokens each placeholder stands for.

        Args:
            counts: of the media of this row.
        """
        if not any(span.views for span in self.spans):
            return LaidOut(self.ids, self.labels, [count.tokens for count in counts])
        spans = zip(self.spans, counts, strict=True)
        ids: list[int] = []
        labels: list[int] = []
        piece_counts: list[int] = []
        for token, label in zip(self.ids, self.labels, strict=True):
            shown = [token]
            if token in placeholders and (pair := next(spans, None)) is not None:
                span, count = pair
                shown, counts_shown = span.shown(count, placeholders) if span.views else ([token], [count.tokens])
                piece_counts += counts_shown
            ids += shown
            labels += [IGNORED_LABEL if token in placeholders else label] * len(shown)
        return LaidOut(ids, labels, piece_counts)

    def cut(self, max_tokens: int, space: Space, placeholders: frozenset[int]) -> "EncodedSample":
        """Cut off what would lie behind `max_tokens` with every medium at its largest budget.

        Raises:
            ValueError: a medium that lies there, whole or in part; the sample is named.
        """
        largest_counts = self.token_counts(space.largest(), space)
        lengths = iter(
            cost.tokens + span.most_tags(cost) for span, cost in zip(self.spans, largest_counts, strict=True)
        )
        length = 0
        for index, token in enumerate(self.ids):
            is_medium = token in placeholders
            length += next(lengths) if is_medium else 1
            if length > max_tokens:
                if any(later in placeholders for later in self.ids[index:]):
                    raise ValueError(
                        f"sample {self.sample_id!r}: a medium lies behind data.max_sample_tokens {max_tokens}"
                    )
                return replace(self, ids=self.ids[:index], labels=self.labels[:index])
        return self


@dataclass(frozen=True)
class Batch:
    """Holds rows and the encoder inputs of their media: `pixel_values`, `audio_values`, `audio_lengths`, ..."""

    rows: Sequence[EncodedSample]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def media(self) -> set[str]:
        """List the media that occur in the batch."""
        return {span.extent.medium for row in self.rows for span in row.spans}


@dataclass(frozen=True)
class Targets:
    """Says where a training step needs logits, flat over (B, S), and what they should say.

    positions, ids, rows: (P,) int64; `rows` says which row of the expanded batch each target belongs to.
    """

    positions: Tensor
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Expanded:
    """Holds the inputs of one forward pass, and what each row of it costs."""

    inputs: dict[str, Tensor]
    labels: Tensor
    token_counts: list[list[TokenCount]]

    def targets(self) -> Targets:
        """Find the positions whose next token is to be learned; the head runs there and nowhere else."""
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
    expert_names: ExpertNames = NO_EXPERT_NAMES,
    share_prefixes: bool = False,
) -> Expanded:
    """Expand a batch to one or more budgets per row.

    Args:
        batch: rows with single placeholders.
        budgets: one list per sampled budget, with one budget per row. A budget may name media a row does not hold.
        placeholder_ids: by medium.
        left_padding: prompts are padded on the left, training rows on the right.
        expert_names: scales and tasks of the adapter; rows then get `scale_ids` and `task_ids` (B,).
        share_prefixes: rows that show the same items at the same cost in the same place, behind the same text, are
            grouped for `generate`: they get `prefix_index` (B,) and `prefix_lengths` (G,), and what is said of media is
            said of the first row of each group alone. Nothing is added where no two rows are alike.

    Raises:
        ValueError: a budget a row cannot meet, or placeholders that do not match the media, or a scale or task that
            the adapter has no expert for; the sample is named.
    """
    placeholders = frozenset(placeholder_ids.values())
    ids, labels, costs, scale_ids, task_ids = [], [], [], [], []
    spans: list[list[PlacedSpan]] = []
    for row, budget in ((row, budget) for each in budgets for row, budget in zip(batch.rows, each, strict=True)):
        row_counts = row.token_counts(budget, space)
        laid_out = row.laid_out(row_counts, placeholders)
        row_ids, row_labels = expand_placeholders(
            laid_out.ids, laid_out.labels, placeholders, laid_out.counts, row.sample_id
        )
        ids.append(row_ids)
        labels.append(row_labels)
        costs.append(row_counts)
        spans.append(_placed_spans(row, row_counts, space))
        expert_ids = _expert_ids(row, row_counts, expert_names)
        scale_ids.append(expert_ids[0])
        task_ids.append(expert_ids[1])
    prefixes = {}
    if share_prefixes:
        keys = [_prefix_key(*of, placeholders) for of in zip(ids, spans, scale_ids, task_ids, strict=True)]
        prefixes = _prefixes(ids, keys, spans)
    inputs = {
        "input_ids": pad_rows(ids, pad_id, left=left_padding),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, left=left_padding),
        **batch.values,
        **_media_inputs([span for of_row in spans for span in of_row]),
        **prefixes,
        **({"scale_ids": torch.tensor(scale_ids)} if expert_names.scales else {}),
        **({"task_ids": torch.tensor(task_ids)} if expert_names.tasks else {}),
    }
    return Expanded(inputs, pad_rows(labels, IGNORED_LABEL, left=left_padding), costs)


def num_prompt_tokens(row: EncodedSample, counts: Sequence[TokenCount]) -> int:
    """Count the tokens of a row whose media cost so many soft tokens each."""
    tags = sum(span.num_tags(count) for span, count in zip(row.spans, counts, strict=True))
    return len(row.ids) - len(row.spans) + tags + sum(count.tokens for count in counts)


def check_length(row: EncodedSample, costs: Sequence[TokenCount], context_tokens: int | None) -> None:
    """Refuse a row that the LLM cannot read whole. Nothing is ever cut: it might be a span of soft tokens.

    Raises:
        ValueError: with the sample, its length and what is allowed.
    """
    soft, length = sum(cost.tokens for cost in costs), num_prompt_tokens(row, costs)
    if context_tokens is not None and length > context_tokens:
        raise ValueError(
            f"sample {row.sample_id!r} is {length} tokens long, {soft} of them soft, and the LLM reads at most "
            f"{context_tokens}; ask for fewer soft tokens or shorten the text"
        )


def _prefix_key(
    ids: Sequence[int],
    spans: Sequence["PlacedSpan"],
    scale_id: int,
    task_id: int,
    placeholders: frozenset[int],
) -> Hashable:
    """Describe what rows have in common that begin alike, up to behind their last soft token; None without media."""
    if not spans:
        return None
    end = max(index for index, token in enumerate(ids) if token in placeholders) + 1
    items = tuple((placed.span.encoder, tuple(placed.items), placed.cost) for placed in spans)
    return tuple(ids[:end]), items, scale_id, task_id


def _prefixes(
    ids: Sequence[Sequence[int]], keys: Sequence[Hashable], spans: list[list["PlacedSpan"]]
) -> dict[str, Tensor]:
    """Group rows that begin alike; takes the spans of all rows but the first of each group out of `spans`."""
    index, lengths = group_rows(ids, keys)
    # One more pass of the LLM costs more than reading a few tokens again does.
    is_short = [length < LEAST_SHARED for length in lengths]
    index, lengths = group_rows(ids, [None if is_short[group] else key for group, key in zip(index, keys, strict=True)])
    if len(lengths) == len(index):
        return {}
    seen: set[int] = set()
    for row, group in enumerate(index):
        if group in seen:
            spans[row] = []
        seen.add(group)
    return {"prefix_index": torch.tensor(index), "prefix_lengths": torch.tensor(lengths)}


def _expert_ids(row: EncodedSample, costs: Sequence[TokenCount], expert_names: ExpertNames) -> tuple[int, int]:
    shown = [(span.extent.medium, cost) for span, cost in zip(row.spans, costs, strict=True) if cost.tokens]
    try:
        is_full = all(
            (cost.each or cost.tokens) == span.num_features(cost) for span, cost in zip(row.spans, costs, strict=True)
        )
        scale_id = expert_names.scale_id(shown, is_full=is_full) if expert_names.scales else NO_EXPERT
        task_id = expert_names.task_id(row.task, [medium for medium, _ in shown]) if expert_names.tasks else NO_EXPERT
    except ValueError as error:
        raise ValueError(f"sample {row.sample_id!r}: {error}") from error
    return scale_id, task_id


@dataclass(frozen=True)
class PlacedSpan:
    """Holds a span at its cost: the encoded items it shows, and the order of their tokens unless that is plain.

    A medium that is left out has no placed span.
    """

    span: MediaSpan
    cost: TokenCount
    items: list[int]
    order: Tensor | None


def _placed_spans(row: EncodedSample, costs: Sequence[TokenCount], space: Space) -> list[PlacedSpan]:
    placed = []
    for span, cost in zip(row.spans, costs, strict=True):
        if not cost.tokens:
            continue
        try:
            items = span.items_of(cost)
        except ValueError as error:
            raise ValueError(f"sample {row.sample_id!r}: {error}") from error
        tiling = space.media[span.extent.medium].tiling
        placed.append(PlacedSpan(span, cost, items, None if tiling is None else order_of(span.extent, cost, tiling)))
    return placed


def _media_inputs(spans: Sequence[PlacedSpan]) -> dict[str, Tensor]:
    """Count tokens and name items of every span; the items are left out where span i simply shows item i.

    Images that are cut into tiles also need `image_layout` (P, 2): for every placeholder of the batch the span of one
    encoded item and the position in it, or `NEWLINE`.
    """
    inputs: dict[str, Tensor] = {}
    for medium in MEDIA:
        of_medium = [placed for placed in spans if placed.span.encoder == medium]
        if not of_medium:
            continue
        # A span of several encoded images is as many spans to the model, each with its own count.
        tokens = [count for placed in of_medium for count in placed.cost.item_tokens]
        inputs[f"num_{medium}_tokens"] = torch.tensor(tokens)
        if medium != "image":
            inputs[f"{medium}_rates"] = torch.tensor([placed.cost.rate for placed in of_medium for _ in placed.items])
        items = [item for placed in of_medium for item in placed.items]
        if items != list(range(len(items))):
            inputs[f"{medium}_index"] = torch.tensor(items)
        if any(placed.order is not None for placed in of_medium):
            inputs[f"{medium}_layout"] = _layout(of_medium)
    return inputs


def _layout(spans: Sequence[PlacedSpan]) -> Tensor:
    """Concatenate the orders of all spans, the encoded items numbered through the batch."""
    first, orders = 0, []
    for placed in spans:
        order = order_of(placed.span.extent, placed.cost, None) if placed.order is None else placed.order
        shift = torch.tensor([first, 0])
        orders.append(torch.where(order[:, :1] == NEWLINE, order, order + shift))
        first += len(placed.items)
    return torch.cat(orders)
