"""Finds the linear maps at the end of compressors that a fit to captions can choose, and the inputs of such a map.

Knows compressors. Does not know captions, the LLM, batches or how a map is chosen.

Shapes: N items, T features, K soft tokens, D' input size of a map, H the LLM's hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.budget import Budget
from mllm.compressors import Compressor, MixtureProjector, Pool, ProjectorBank, Query
from mllm.compressors.base import zero_padding_features

PINV_RTOL = 1e-3
"""Directions that a projection shrinks by more than this are not used to carry a bias."""


@dataclass(frozen=True)
class Readout:
    """Wraps one linear map D' -> H from what a compressor made of an item to soft tokens.

    Args:
        compressor: whose map it is.
        largest: the budget it is fitted at.
        smallest: the budget its scale is chosen at.
    """

    compressor: Compressor
    largest: Budget
    smallest: Budget

    @property
    def sizes(self) -> tuple[int, int]:
        """(D', H)."""
        raise NotImplementedError

    def summed(self, read: Tensor, counts: Tensor, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Sum all of an item as the map would be fed with it, and count such inputs.

        Args:
            read: (N, K, D') what the open compressor gave at the largest budget, zero beyond each item's own count.
            counts: (N,) soft tokens of each item.
            features: (N, T, D) of the encoder, of which (N,) `lengths` exist.

        Returns:
            (N, D') and (N,).
        """
        return read.sum(1), counts

    def carried(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return what of the bias (H,) `put` can give the map."""
        return bias

    def put(self, weight: Tensor, bias: Tensor) -> None:
        """Set the map to x -> x @ weight + bias, (D', H) and (H,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProjectorReadout(Readout):
    """Wraps the last layer of one projector of a bank."""

    layer: nn.Linear

    @property
    def sizes(self) -> tuple[int, int]:
        """(D', H)."""
        return self.layer.in_features, self.layer.out_features

    def put(self, weight: Tensor, bias: Tensor) -> None:
        """Set the layer."""
        self.layer.weight.copy_(weight.T)
        self.layer.bias.copy_(bias)


@dataclass(frozen=True)
class QueryReadout(Readout):
    """Wraps the projection behind queries, which is fitted to what a query would read of each feature alone.

    What all queries read together is no whole: some features are read by many of them and some by few.
    """

    @property
    def sizes(self) -> tuple[int, int]:
        """(C, H)."""
        rows, columns = cast(Query, self.compressor).proj.shape
        return rows, columns

    def summed(self, read: Tensor, counts: Tensor, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `Readout`."""
        values = cast(Query, self.compressor).values(features)
        return zero_padding_features(values, lengths).sum(1), lengths

    def carried(self, weight: Tensor, bias: Tensor) -> Tensor:
        """See `Readout`; only what lies in the range of the projection is carried."""
        return weight.T @ _before(weight, bias)

    def put(self, weight: Tensor, bias: Tensor) -> None:
        """Set the projection; the bias, which it has not, goes into that of the layer before as far as it can."""
        query = cast(Query, self.compressor)
        query.proj.copy_(weight)
        query.attn.out_proj.bias.add_(_before(weight, bias))


def _before(weight: Tensor, bias: Tensor) -> Tensor:
    """Find (D',) that a projection (D', H) maps to the bias (H,), as nearly as it can.

    Normed values span one direction less than they have numbers, so the projection nearly loses directions.
    """
    return torch.linalg.pinv(weight.T, rtol=PINV_RTOL) @ bias


def readouts(compressor: Compressor, trained: Sequence[Budget]) -> list[Readout]:
    """List the maps of a compressor, one per projector.

    Args:
        compressor: pool or stack, or query on images.
        trained: the budgets of its medium, largest first.

    Raises:
        ValueError: a compressor that does not end in linear maps.
    """
    if isinstance(compressor, Query) and not compressor.windowed:
        return [QueryReadout(compressor, trained[0], trained[-1])]
    bank = getattr(compressor, "projectors", None)
    if not isinstance(bank, ProjectorBank):
        name = type(compressor).__name__.lower()
        raise ValueError(f"data.captions cannot fit a {name} here; allowed: pool, stack, and query on images")
    if any(isinstance(projector, MixtureProjector) for projector in bank):
        raise ValueError(
            "data.captions fits one projector, not a mixture; use projector.kind mlp, or leave out the captions"
        )
    lasts = [cast(nn.Sequential, projector)[-1] for projector in bank]
    if others := {type(last).__name__ for last in lasts if not isinstance(last, nn.Linear)}:
        raise ValueError(
            f"data.captions needs projectors that end in a linear layer, got {', '.join(sorted(others))}; "
            "set projector.norm to false"
        )
    pairs = [(budget, budget) for budget in trained] if bank.budgets else [(trained[0], trained[-1])]
    return [
        ProjectorReadout(compressor, *pair, layer=cast(nn.Linear, last))
        for pair, last in zip(pairs, lasts, strict=True)
    ]


@contextmanager
def opened(compressor: Compressor) -> Iterator[None]:
    """Let the compressor give what its maps are fed with, inside; what follows the maps is linear.

    A grid in Haar order is then read as plain grids: its details are differences, which do not add up to the image.
    """
    if isinstance(compressor, Query):
        proj = compressor.proj
        compressor.proj = nn.Parameter(torch.eye(len(proj), dtype=proj.dtype, device=proj.device), requires_grad=False)
        try:
            yield
        finally:
            compressor.proj = proj
        return
    projectors = [cast(nn.Sequential, projector) for projector in cast(ProjectorBank, compressor.projectors)]
    lasts = [projector[-1] for projector in projectors]
    order = compressor.order if isinstance(compressor, Pool) else None
    try:
        for projector in projectors:
            projector[-1] = nn.Identity()
        if isinstance(compressor, Pool):
            compressor.order = "raster"
        yield
    finally:
        for projector, last in zip(projectors, lasts, strict=True):
            projector[-1] = last
        if isinstance(compressor, Pool) and order is not None:
            compressor.order = order


def with_one(tokens: Tensor) -> Tensor:
    """Append to each token a 1 that stands for the bias: (n, D') -> (n, D'+1)."""
    return functional.pad(tokens, (0, 1), value=1.0)
