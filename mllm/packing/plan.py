"""Plans how many rows lie in one, every beginning that rows share held once: who may see what, where each row lies.

Knows rows as sequences of keys, equal where the tokens are equal. Does not know what a token is, the model or budgets.

    row 0  a b c d e f            packed   a b c d e f | x y | z
    row 1  a b x y                sees       (causal)    0:2   0:3
    row 2  a b c z                rows     0..5 | 0 1 6 7 | 0 1 2 8

A token of a decoder depends on the tokens before it alone, so rows that begin alike are alike there, and one copy does.
Each row adds one segment, the part that no row before it has; a segment sees the ranges of its row before it, and of
itself what a causal mask lets through. There is no padding. Positions are those of a token's own row.

Shapes: B rows, S tokens of the longest row, L tokens of the packed row, G segments.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

LEAST_SHARED = 8
"""Shorter beginnings are computed again: a segment that sees nothing before itself needs no mask, which is quicker."""
Range = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """Holds tokens [start, stop) of the packed row, and the ranges before them that they may see, in order."""

    start: int
    stop: int
    visible: tuple[Range, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the segment itself."""
        return self.stop - self.start

    @property
    def num_visible(self) -> int:
        """Tokens before it that it may see."""
        return sum(stop - start for start, stop in self.visible)


@dataclass(frozen=True)
class SegmentPlan:
    """Says how B rows lie in one packed row of L tokens.

    Args:
        segments: in the order of the packed row, which they tile.
        rows: (B, S) int64, where each token of each row lies, -1 on padding.
        position_ids: (1, L) int64, each token's position in its own row.
        source_rows: (L,) int64, the row that each token was placed for; others may share it.
        attended: (A,) int64, for all segments that see something before themselves the places they see, themselves
            included, after each other.
        layouts: by medium, (n, 2) int64: for each placeholder of the packed row in turn its span, or -1 for a
            newline, and its number in that.
        groups: by medium, how many spans follow each other that are of similar length, and the longest of them.
    """

    segments: tuple[Segment, ...]
    rows: Tensor
    position_ids: Tensor
    source_rows: Tensor
    attended: Tensor
    layouts: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.segments[-1].stop

    @cached_property
    def masks(self) -> tuple[Tensor, ...]:
        """Build, once for all layers, the mask (n, v + n) of each segment that sees something before itself.

        It shows everything before the segment, and of itself what a causal mask lets through.
        """
        return tuple(
            torch.ones(
                segment.length, segment.num_visible + segment.length, dtype=torch.bool, device=self.attended.device
            ).tril(segment.num_visible)
            for segment in self.segments
            if segment.visible
        )

    def to(self, device: torch.device) -> "SegmentPlan":
        """Return the same on a device."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            source_rows=self.source_rows.to(device, non_blocking=True),
            attended=self.attended.to(device, non_blocking=True),
            layouts={medium: layout.to(device, non_blocking=True) for medium, layout in self.layouts.items()},
        )

    def unpack(self, packed: Tensor, fill: float = 0) -> Tensor:
        """Bring values at the tokens of the packed row, (1, L, ...), back into rows: (B, S, ...), `fill` on padding."""
        by_row = packed[0][self.rows.clamp(min=0)]
        is_padding = (self.rows < 0).view(*self.rows.shape, *[1] * (by_row.dim() - 2))
        return by_row.masked_fill(is_padding, fill)

    def owners(self) -> Tensor:
        """Number the segment each token lies in, (L,); on the host."""
        return torch.repeat_interleave(torch.tensor([segment.length for segment in self.segments]))

    def limits(self) -> Tensor:
        """Say up to which token segment g may see segment h, (G, G), itself to its end; on the host."""
        starts = [segment.start for segment in self.segments]
        limits = torch.zeros(len(starts), len(starts), dtype=torch.int64)
        for index, segment in enumerate(self.segments):
            limits[index, index] = segment.stop
            for start, stop in segment.visible:  # every visible range begins where a segment does
                limits[index, starts.index(start)] = stop
        return limits

    def dense_mask(self) -> Tensor:
        """Build the mask (L, L), true where the token of its row may see that of its column; on the host."""
        owners, limits, token = self.owners(), self.limits(), torch.arange(self.num_tokens)
        return (token <= token[:, None]) & (token < limits[owners[:, None], owners])


def plan_rows(
    rows: Sequence[Sequence[int]], groups: Sequence[Hashable] = (), *, least_shared: int = LEAST_SHARED
) -> SegmentPlan:
    """Lay rows out in one.

    Rows are placed from the largest key down: of those that begin alike the one whose next key is larger comes first.

    Args:
        rows: keys of each row's tokens; none is empty.
        groups: one per row; only rows of equal groups share.
        least_shared: shorter beginnings are not shared.
    """
    groups = groups or [0] * len(rows)
    names = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    order = sorted(range(len(rows)), key=lambda row: (-names[groups[row]], list(rows[row])), reverse=True)
    segments: list[Segment] = []
    segment_rows: list[int] = []
    # The path of a row: the ranges of the packed row that hold its tokens, in order.
    paths: dict[int, list[Range]] = {}
    path: list[Range] = []
    previous: int | None = None
    for row in order:
        num_shared = 0
        if previous is not None and groups[previous] == groups[row]:
            # Sorted so, no row placed before has a longer beginning in common with this one than the last has.
            num_shared = _num_alike(rows[previous], rows[row])
        path = _first(path, num_shared if num_shared >= least_shared else 0)
        # A row that is the whole beginning of the last one adds nothing.
        if rest := len(rows[row]) - sum(stop - start for start, stop in path):
            start = segments[-1].stop if segments else 0
            segments.append(Segment(start, start + rest, tuple(path)))
            path = [*path, (start, start + rest)]
            segment_rows.append(row)
        paths[row], previous = path, row
    return _with_tensors(segments, segment_rows, [paths[row] for row in range(len(rows))])


def _num_alike(first: Sequence[int], second: Sequence[int]) -> int:
    shorter = min(len(first), len(second))
    differs = np.asarray(first[:shorter]) != np.asarray(second[:shorter])
    return int(differs.argmax()) if differs.any() else shorter


def _first(path: Sequence[Range], num_tokens: int) -> list[Range]:
    """Cut a path after its first tokens."""
    kept: list[Range] = []
    for start, stop in path:
        if num_tokens <= 0:
            break
        kept.append((start, min(stop, start + num_tokens)))
        num_tokens -= stop - start
    return kept


def _with_tensors(
    segments: Sequence[Segment], segment_rows: Sequence[int], paths: Sequence[Sequence[Range]]
) -> SegmentPlan:
    token_numbers = [_numbers_in(path) for path in paths]
    positions = np.zeros(segments[-1].stop, dtype=np.int64)
    for of_row in token_numbers:
        positions[of_row] = np.arange(len(of_row))  # rows that share a token have it at the same position
    rows = np.full((len(token_numbers), max(map(len, token_numbers))), -1, dtype=np.int64)
    for row, of_row in zip(rows, token_numbers, strict=True):
        row[: len(of_row)] = of_row
    attended = [_numbers_in([*one.visible, (one.start, one.stop)]) for one in segments if one.visible]
    lengths = torch.tensor([segment.length for segment in segments])
    return SegmentPlan(
        segments=tuple(segments),
        rows=torch.from_numpy(rows),
        position_ids=torch.from_numpy(positions)[None],
        source_rows=torch.tensor(segment_rows).repeat_interleave(lengths),
        attended=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *attended])),
    )


def _numbers_in(path: Sequence[Range]) -> np.ndarray:
    """List the numbers of all tokens in ranges, in order."""
    return np.concatenate([np.arange(start, stop) for start, stop in path])
