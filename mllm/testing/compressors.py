"""Checks the contract of a compressor: shapes, exact counts, padding, batches, nesting, gradients and refusals.

Knows `Compressor`, budgets and their counting. Does not know what a compressor computes.

Shapes: N items, T features of the longest item, D feature size, K soft tokens, H the LLM's hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.budget import Amount, Extent, MediumSpace, TokenCount
from mllm.compressors.base import Compressor

FRAMES_PER_SECOND = 25.0
"""The clock of the streams that are made up here; only budgets in tokens per second depend on it."""


@dataclass(frozen=True)
class CompressorCase:
    """A compressor with what its checks need to make up inputs.

    Args:
        compressor: with random weights, in float32 on the CPU.
        space: its budgets and how they are counted.
        in_size: D.
        out_size: H.
        grid: (rows, columns) of the features, for images of one grid.
        item_grids: (rows, columns) of each item, for images that keep their shape.
        lengths: features of each item, for streams; each long enough for every trained budget.
        refused: budgets that must be refused, such as `/3` or `0`.
        tolerance: largest difference, relative to the largest value, between results that should be equal.
    """

    compressor: Compressor
    space: MediumSpace
    in_size: int
    out_size: int
    grid: tuple[int, int] | None = None
    item_grids: tuple[tuple[int, int], ...] = ()
    lengths: tuple[int, ...] = (24, 48, 36)
    refused: tuple[str, ...] = ()
    tolerance: float = 1e-5

    @property
    def extents(self) -> list[Extent]:
        """Lists the extents of the items that are made up."""
        medium = self.space.medium
        if self.item_grids:
            return [Extent(medium, grid=grid) for grid in self.item_grids]
        if self.grid is not None:
            return [Extent(medium, grid=self.grid)] * 3
        return [Extent(medium, num_frames=length, frames_per_second=FRAMES_PER_SECOND) for length in self.lengths]

    def features(self, *, seed: int = 0) -> Tensor:
        """Makes random features (N, T, D), noise beyond each item's length included."""
        longest = max(extent.length for extent in self.extents)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(self.extents), longest, self.in_size, generator=generator)

    def run(
        self,
        features: Tensor,
        counts: Sequence[TokenCount],
        *,
        items: Sequence[int] | None = None,
        max_tokens: int | None = None,
    ) -> Tensor:
        """Compresses items, all of them by default: (N, T, D) -> (N, K, H), K the largest count unless given."""
        chosen = range(len(counts)) if items is None else items
        return self.compressor(
            features,
            torch.tensor([self.extents[item].length for item in chosen]),
            tokens=torch.tensor([count.tokens for count in counts]),
            rates=torch.tensor([count.rate for count in counts]),
            max_tokens=max_tokens or max(count.tokens for count in counts),
            grids=torch.tensor([self.item_grids[item] for item in chosen]) if self.item_grids else None,
        )

    def counts(self, amount: Amount) -> list[TokenCount]:
        """Counts the soft tokens of each item at an amount."""
        return [self.space.count(amount, extent) for extent in self.extents]


def check_compressor(case: CompressorCase) -> None:
    """Checks everything a compressor promises.

    Raises:
        AssertionError: a promise is broken; the message says which, and at which budget.
    """
    case.compressor.eval()
    check_counts(case)
    check_shapes(case)
    check_padding(case)
    check_batch_equals_single(case)
    check_nesting(case)
    check_gradients(case)


def check_shapes(case: CompressorCase) -> None:
    """Checks that the output is (N, K, H), exactly zero beyond each item's count and not zero within it."""
    with torch.no_grad():
        for amount in case.space.trained:
            counts = case.counts(amount)
            longest = max(count.tokens for count in counts)
            for max_tokens in (longest, longest + 3):
                soft = case.run(case.features(), counts, max_tokens=max_tokens)
                shape = (len(counts), max_tokens, case.out_size)
                assert soft.shape == shape, f"at {amount} the output is {tuple(soft.shape)}, it should be {shape}"
                for item, (count, tokens) in enumerate(zip(counts, soft, strict=True)):
                    padding, within = tokens[count.tokens :], tokens[: count.tokens]
                    assert not padding.any(), f"at {amount} item {item} is not zero beyond its {count.tokens} tokens"
                    assert within.abs().amax(dim=1).all(), f"at {amount} item {item} has a soft token of zeros"


def check_counts(case: CompressorCase) -> None:
    """Checks that every trained budget is counted exactly, and that those of `refused` are refused."""
    for amount in case.space.trained:
        for extent, count in zip(case.extents, case.counts(amount), strict=True):
            assert count.tokens >= 1, f"{amount} gives {count.tokens} soft tokens of {extent.length} features"
            if amount.kind == "tokens":
                assert count.tokens == amount.value, f"{amount} is counted as {count.tokens} soft tokens"
    for text in case.refused:
        try:
            counts = case.counts(Amount.parse(text))
        except ValueError:
            continue
        raise AssertionError(f"{text} should be refused, and is counted as {[count.tokens for count in counts]}")


def check_padding(case: CompressorCase) -> None:
    """Checks that what lies beyond an item's length changes nothing, whatever its values."""
    lengths = torch.tensor([extent.length for extent in case.extents])
    features = case.features()
    is_padding = torch.arange(features.shape[1]) >= lengths[:, None]
    loud = torch.where(is_padding[..., None], 1e3 * case.features(seed=1), features)
    with torch.no_grad():
        for amount in case.space.trained:
            counts = case.counts(amount)
            _assert_close(case, case.run(loud, counts), case.run(features, counts), f"at {amount} padding is read")


def check_batch_equals_single(case: CompressorCase) -> None:
    """Checks that items of different budgets in one batch give what each of them gives alone."""
    features, amounts = case.features(), case.space.trained
    for shift in range(len(amounts)):
        chosen = [amounts[(item + shift) % len(amounts)] for item in range(len(case.extents))]
        counts = [case.space.count(amount, extent) for amount, extent in zip(chosen, case.extents, strict=True)]
        with torch.no_grad():
            together = case.run(features, counts)
            for item, (extent, count) in enumerate(zip(case.extents, counts, strict=True)):
                alone = case.run(features[item : item + 1, : extent.length], [count], items=[item])
                what = f"item {item} at {chosen[item]} differs in a batch of {', '.join(map(str, chosen))}"
                _assert_close(case, together[item : item + 1, : count.tokens], alone, what)


def check_nesting(case: CompressorCase) -> None:
    """Checks what `nested` promises.

    With `prefix` the tokens of a smaller budget are the first of a larger one; with `pooled` they are means, and so are
    all the same where all features are.
    """
    features = case.features()
    assert case.compressor.nested in ("prefix", "pooled", "none"), f"nested is {case.compressor.nested!r}"
    if case.compressor.nested == "pooled":
        features = features[:, :1].expand_as(features)
    with torch.no_grad():
        by_amount = [(amount, case.counts(amount)) for amount in case.space.trained]
        outputs = [(amount, counts, case.run(features, counts)) for amount, counts in by_amount]
    if case.compressor.nested == "pooled":
        for amount, counts, soft in outputs:
            for count, tokens in zip(counts, soft, strict=True):
                first = tokens[:1].expand(count.tokens, -1)
                _assert_close(case, tokens[: count.tokens], first, f"at {amount} tokens are not means of the features")
    if case.compressor.nested != "prefix" or (case.grid is None and not case.item_grids):
        return  # of a stream the prefixes are those of its windows, which only the compressor knows
    largest_amount, _, largest = max(outputs, key=lambda output: output[2].shape[1])
    for amount, counts, soft in outputs:
        for item, count in enumerate(counts):
            what = f"the tokens of item {item} at {amount} are not the first of those at {largest_amount}"
            _assert_close(case, soft[item, : count.tokens], largest[item, : count.tokens], what)


def check_gradients(case: CompressorCase) -> None:
    """Checks that every weight gets a gradient at every budget, as processes that train together demand."""
    case.compressor.train()
    try:
        for amount in case.space.trained:
            case.compressor.zero_grad(set_to_none=True)
            case.run(case.features(), case.counts(amount)).sum().backward()
            missing = [name for name, weight in case.compressor.named_parameters() if weight.grad is None]
            assert not missing, f"at {amount} {missing[0]} gets no gradient, and other processes would wait for it"
    finally:
        case.compressor.zero_grad(set_to_none=True)
        case.compressor.eval()


def _assert_close(case: CompressorCase, got: Tensor, wanted: Tensor, what: str) -> None:
    error, scale = (got - wanted).abs().max().item(), max(wanted.abs().max().item(), 1e-12)
    assert error <= case.tolerance * scale, f"{what}: the largest difference is {error:.3g} at values up to {scale:.3g}"
