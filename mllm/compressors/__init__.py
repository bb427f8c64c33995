"""Compressors turn features into soft tokens at any budget. One file per kind, and the function that builds them.

Knows the block of a medium's config and the sizes on both sides.
Does not know encoders, weights, or which budget a request will ask for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm.budget.nesting import haar_grids
from mllm.compressors.area_pooling import grid_rows
from mllm.compressors.base import Compressor
from mllm.compressors.hybrid import Hybrid
from mllm.compressors.moe_projector import MixtureProjector
from mllm.compressors.newline import Newline
from mllm.compressors.pool import Pool
from mllm.compressors.projector import Projector, ProjectorBank
from mllm.compressors.query import Query
from mllm.compressors.stack import Stack
from mllm.compressors.word_projector import WordProjector
from mllm.config.medium import COMPRESSORS as CONFIGS
from mllm.config.medium import MediumConfig, MlpConfig, MoeConfig, NoProjectorConfig, WordsConfig
from mllm.config.medium import Projector as ProjectorBlock
from mllm.utils.registry import Registry

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Hybrid",
    "MixtureProjector",
    "Newline",
    "Pool",
    "Projector",
    "ProjectorBank",
    "Query",
    "Site",
    "Stack",
    "WordProjector",
    "build_compressor",
    "build_projector",
    "register_compressor",
]

SIZE_PER_HEAD = 64
"""Features per attention head, where a config leaves the number of heads open."""


@dataclass(frozen=True)
class Site:
    """Says where a compressor stands.

    Args:
        medium: for messages.
        in_size: size of a feature.
        out_size: the LLM's hidden size.
        grid: (rows, columns) of the features, for images; of a square one where images keep their shape.
    """

    medium: str
    in_size: int
    out_size: int
    grid: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Return the block's place in a config."""
        return f"model.{self.medium}"


def build_compressor(
    medium: str,
    block: MediumConfig,
    *,
    in_size: int,
    out_size: int,
    grid: tuple[int, int] | None = None,
    max_patches: int | None = None,
) -> Compressor:
    """Make a compressor with random weights; works on the meta device.

    Args:
        medium: for messages.
        block: how the medium becomes soft tokens.
        in_size: size of a feature.
        out_size: the LLM's hidden size.
        grid: (rows, columns) of the features, for images; of a square one where images keep their shape.
        max_patches: most features of an image, where images keep their shape.

    Raises:
        ValueError: trained budgets that the compressor cannot meet on these features.
    """
    site = Site(medium, in_size, out_size, grid)
    if max_patches is not None:
        _check_item_grids(site, block)
    return COMPRESSORS.find(block.compressor.kind, key=f"{site.key}.compressor.kind")(site, block)


def build_projector(block: ProjectorBlock, *, in_size: int, out_size: int) -> nn.Module:
    """Make a projector with random weights, or the identity.

    Args:
        in_size: size of what it reads.
        out_size: the LLM's hidden size.

    Raises:
        ValueError: no projector for features that are not as wide as the LLM.
    """
    if isinstance(block, NoProjectorConfig):
        if in_size != out_size:
            raise ValueError(f"projector none needs features as wide as the LLM, {out_size}; they have {in_size}")
        return nn.Identity()
    if isinstance(block, WordsConfig):
        hidden_size = out_size if block.hidden_size == "auto" else block.hidden_size
        return WordProjector(
            in_size=in_size,
            hidden_size=hidden_size,
            num_words=block.num_words,
            stretch_frames=block.stretch_frames,
            out_size=out_size,
        )

    def one() -> Projector:
        hidden_size = None
        activation = "gelu"
        if isinstance(block, MlpConfig | MoeConfig):
            activation = block.activation
            # 0 is that of experts of a single layer
            hidden_size = out_size if block.hidden_size == "auto" else block.hidden_size or None
        return Projector(
            in_size=in_size, out_size=out_size, hidden_size=hidden_size, norm=block.norm, activation=activation
        )

    if isinstance(block, MoeConfig):
        return MixtureProjector([one() for _ in range(block.num_experts)], in_size=in_size, top_k=block.top_k)
    return one()


def count_heads(num_heads: int | str, size: int) -> int:
    """Return the attention heads of queries of this size."""
    return max(size // SIZE_PER_HEAD, 1) if isinstance(num_heads, str) else num_heads


def _build_pool(site: Site, block: MediumConfig) -> Pool:
    projector = block.projector
    order: Any = getattr(block.compressor, "order", "raster")
    _check_counts(site, block)
    if order == "haar":
        _check_haar(site, block)
    budgets = tuple(block.values) if projector.per_budget else ()
    projectors = [build_projector(projector, in_size=site.in_size, out_size=site.out_size) for _ in budgets or (0,)]
    return Pool(
        projectors=ProjectorBank(projectors, budgets=budgets),
        grid=site.grid,
        project_first=getattr(projector, "before_pooling", False),
        order=order,
        keeps_full=isinstance(projector, NoProjectorConfig),
    )


def _check_haar(site: Site, block: MediumConfig) -> None:
    assert site.grid is not None  # streams have no order
    counts = [rows * columns for rows, columns in haar_grids(site.grid)]
    if wrong := [budget for budget in block.values if budget not in counts]:
        raise ValueError(
            f"{site.key}.budgets: {wrong[0]} tokens are no whole grid of one of {site.grid[0]}x{site.grid[1]} in Haar "
            f"order; allowed: {', '.join(map(str, counts))}"
        )


def _build_stack(site: Site, block: MediumConfig) -> Stack:
    _check_counts(site, block)
    grid, budgets = site.grid, tuple(block.values)

    def joined(num_features: int) -> nn.Module:
        return build_projector(block.projector, in_size=site.in_size * num_features, out_size=site.out_size)

    if grid is None:
        return Stack(projectors=ProjectorBank([joined(rate) for rate in budgets], budgets=budgets))
    whole = _whole_blocks(grid)
    if wrong := [budget for budget in budgets if budget not in whole]:
        raise ValueError(
            f"{site.key}.budgets: {wrong[0]} blocks of whole patches do not tile a grid of {grid[0]}x{grid[1]}; "
            f"allowed: {', '.join(map(str, whole))}"
        )
    bank = ProjectorBank([joined(grid[0] * grid[1] // budget) for budget in budgets], budgets=budgets)
    return Stack(projectors=bank, grid_rows=tuple(whole[budget] for budget in budgets), grid=grid)


def _build_query(site: Site, block: MediumConfig) -> Query:
    _check_counts(site, block)
    num_queries, compressor = block.num_queries, block.compressor
    if site.grid is None:
        query_grid, feature_grid = (1, num_queries), (1, compressor.window_frames)
    else:
        query_grid, feature_grid = _query_grid(site.key, num_queries, site.grid), site.grid
    return Query(
        in_size=site.in_size,
        out_size=site.out_size,
        query_grid=query_grid,
        feature_grid=feature_grid,
        keys=compressor.keys,
        size=site.in_size,
        num_heads=count_heads(compressor.num_heads, site.in_size),
        windowed=site.grid is None,
    )


def _build_hybrid(site: Site, block: MediumConfig) -> Hybrid:
    grid, anchors = site.grid, block.anchors
    assert grid is not None  # a stream has no such compressor
    _check_counts(site, block)
    if anchors[-1] > grid[0] * grid[1]:
        raise ValueError(
            f"{site.key}.compressor.anchors: {anchors[-1]} cannot be pooled of a grid of {grid[0]}x{grid[1]}"
        )
    return Hybrid(
        in_size=site.in_size,
        projector=build_projector(block.projector, in_size=site.in_size, out_size=site.out_size),
        grid=grid,
        anchors=anchors,
        max_tokens=max(block.values),
        num_heads=count_heads(block.compressor.num_heads, site.in_size),
    )


Builder = Callable[[Site, MediumConfig], Compressor]
COMPRESSORS: Registry[Builder] = Registry(
    "compressor", {"pool": _build_pool, "query": _build_query, "stack": _build_stack, "hybrid": _build_hybrid}
)
"""What builds each kind, by the `kind` of its config."""


def register_compressor(kind: str, build: Builder, *, config: type, media: Sequence[str]) -> None:
    """Add a compressor from outside, which configs of these media then name by `compressor: {kind: ...}`.

    Args:
        build: makes it, with random weights, of where it stands and the medium's block; on the meta device too.
        config: frozen dataclass of its keys, all with defaults: `kind`, and as class variable `counting` the rule by
            which its budgets are counted (`pool`, `query`, `stack` or `hybrid`). It is easiest to derive it from the
            config of a kind that is counted alike, whose FLOPs it then has as well.
        media: the media it is for: image, audio, video (audio and video go together, both being streams).

    Raises:
        ValueError: the name is taken by another compressor, or a medium that there is not.
    """
    for medium in media:
        if medium not in CONFIGS:
            raise ValueError(f"media names {medium!r}; allowed: {', '.join(CONFIGS)}")
        CONFIGS[medium].check_free(kind, config)
    COMPRESSORS.register(kind, build)
    for medium in media:
        CONFIGS[medium].register(kind, config)


def _check_item_grids(site: Site, block: MediumConfig) -> None:
    """Refuse what needs one grid for all images."""
    kind = block.compressor.kind
    if kind not in (allowed := ("pool", "query")):
        raise ValueError(
            f"{site.key}.compressor.kind {kind} needs one grid, and here each image has its own; "
            f"allowed: {', '.join(allowed)}"
        )
    if (order := getattr(block.compressor, "order", "raster")) != "raster":
        raise ValueError(
            f"{site.key}.compressor.order {order} needs one grid, and here each image has its own; allowed: raster"
        )


def _check_counts(site: Site, block: MediumConfig) -> None:
    """Refuse counts above the features of a grid; queries may be more than those, and a config counts them."""
    if site.grid is None or block.compressor.counting not in ("pool", "stack") or not block.has_counts:
        return
    most = site.grid[0] * site.grid[1]
    if (largest := max(block.values)) > most:
        raise ValueError(f"{site.key}.budgets: {largest} tokens cannot be met; allowed are counts 1..{most}")


def _whole_blocks(grid: tuple[int, int]) -> dict[int, int]:
    """Find the counts of equal blocks of whole patches that tile a grid, each with the rows they form."""
    counts = torch.arange(1, grid[0] * grid[1] + 1, device="cpu")
    rows = grid_rows(counts, grid).tolist()
    return {
        count: row
        for count, row in enumerate(rows, start=1)
        if count % row == 0 and grid[0] % row == 0 and grid[1] % (count // row) == 0
    }


def _query_grid(key: str, num_queries: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Find rows and columns of the queries: the factors of M closest to the shape of the feature grid.

    Keys take their positions from the queries', which see one axis badly if a query's cell is long and narrow (1:4).
    """

    def stretch(count: int, rows: int) -> float:
        ratio = rows * rows * grid[1] / (count * grid[0])
        return max(ratio, 1 / ratio)

    def best(count: int) -> int:
        return min((rows for rows in range(1, count + 1) if count % rows == 0), key=lambda rows: stretch(count, rows))

    rows = best(num_queries)
    if stretch(num_queries, rows) > 4:
        near = [count for count in range(1, 2 * num_queries) if stretch(count, best(count)) <= 4]
        near = sorted(sorted(near, key=lambda count: abs(count - num_queries))[:4])
        raise ValueError(
            f"{key}.compressor.num_queries={num_queries} forms no grid like {grid[0]}x{grid[1]}; "
            f"the nearest that do: {', '.join(map(str, near))}"
        )
    return rows, num_queries // rows
