"""Compressors: features to soft tokens at any budget. One file per kind, and the one function that reads settings.

Knows the `media.<medium>` block of a config and the sizes on both sides.
Does not know encoders, weights, or which budget a request will ask for.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mllm.budget import Amount, MediumSpace
from mllm.budget.nesting import haar_grids, hybrid_sizes
from mllm.compressors.area_pooling import grid_rows
from mllm.compressors.base import Compressor
from mllm.compressors.hybrid import Hybrid
from mllm.compressors.moe_projector import MixtureProjector
from mllm.compressors.newline import Newline
from mllm.compressors.pool import Pool
from mllm.compressors.projector import Projector, ProjectorBank
from mllm.compressors.query import Query
from mllm.compressors.stack import Stack

__all__ = [
    "SETTINGS",
    "Compressor",
    "Hybrid",
    "MixtureProjector",
    "Newline",
    "Pool",
    "Projector",
    "ProjectorBank",
    "Query",
    "Stack",
    "build_compressor",
]

ORDERS = ("raster", "haar")
_MIXTURE = ("projector_top_k", "projector_balance_weight", "projector_z_weight")
_PROJECTOR = ("projector_size", "projector_norm", "projector_activation", "projector_experts", *_MIXTURE)
_OWN_SETTINGS = {
    "query": ("keys", "query_size", "query_heads"),
    "pool": ("project_first", "order", *_PROJECTOR),
    "stack": _PROJECTOR,
    "hybrid": ("anchors", "query_heads", "projector_size", "projector_norm", "projector_activation"),
}
SETTINGS = tuple(dict.fromkeys(key for keys in _OWN_SETTINGS.values() for key in keys))
"""The keys of a `media.<medium>` block that shape a compressor, beside those that shape its space (`MediumSpace`)."""


def build_compressor(
    medium: str,
    settings: Mapping[str, Any],
    *,
    in_size: int,
    out_size: int,
    grid: tuple[int, int] | None = None,
    max_patches: int | None = None,
) -> Compressor:
    """A compressor with random weights; works on the meta device.

    Args:
        medium: for messages.
        settings: the `media.<medium>` block. Read here, beside what `MediumSpace.from_settings` reads:
            keys: `position` (as MQT, the default) or `content`, for `query`.
            query_size, query_heads: size and heads of the queries; the encoder's size and one head per 64 of it.
            anchors: sizes of the pooled map of `hybrid`, see `hybrid_sizes`.
            project_first: pool behind the projector, as M3; for `pool`.
            order: of a grid's soft tokens: `raster` or, for `pool`, `haar`, in which small budgets are prefixes.
            projector_size: hidden size of the projector; the LLM's unless given, and null for a single Linear.
            projector_norm: a LayerNorm behind the projector.
            projector_activation: `gelu` or `relu`.
            projector_experts, projector_top_k: a mixture of so many projectors, of which a token uses 2, or so many.
        in_size: size of a feature.
        out_size: the LLM's hidden size.
        grid: (rows, columns) of the features, for images; of a square one where images keep their shape.
        max_patches: most features of an image, where images keep their shape.

    Raises:
        ValueError: settings of another compressor, or trained budgets that this one cannot meet.
    """
    space = MediumSpace.from_settings(medium, settings)
    key = f"media.{medium}"
    if misplaced := sorted(set(settings) & set(SETTINGS) - set(_OWN_SETTINGS[space.compressor])):
        allowed = ", ".join(_OWN_SETTINGS[space.compressor])
        raise ValueError(f"{key}.{misplaced[0]} does not apply to compressor {space.compressor!r}; allowed: {allowed}")
    if max_patches is not None:
        _check_own_grids(key, space, settings)
    builders = {"query": _build_query, "pool": _build_pool, "stack": _build_stack, "hybrid": _build_hybrid}
    return builders[space.compressor](key, space, settings, (in_size, out_size), grid)


def _build_pool(
    key: str, space: MediumSpace, settings: Mapping[str, Any], sizes: tuple[int, int], grid: tuple[int, int] | None
) -> Pool:
    if (order := settings.get("order", "raster")) not in ORDERS:
        raise ValueError(f"{key}.order={order!r} is not one of: {', '.join(ORDERS)}")
    _check_kinds(key, space, grid, allowed=("tokens",) if grid else ("tokens", "rate"))
    if order == "haar":
        _check_haar(key, space, settings, grid)
    budgets = _values(space.trained) if settings.get("per_budget_projector", False) else ()
    if "projector_experts" in settings and settings.get("project_first", False):
        raise ValueError(f"{key}.projector_experts route soft tokens, and with project_first there are none yet")
    projectors = [_projector(settings, *sizes) for _ in budgets or (0,)]
    return Pool(
        projectors=ProjectorBank(projectors, budgets=budgets),
        grid=grid,
        project_first=settings.get("project_first", False),
        order=order,
    )


def _check_haar(key: str, space: MediumSpace, settings: Mapping[str, Any], grid: tuple[int, int] | None) -> None:
    if grid is None:
        raise ValueError(f"{key}.order='haar' is an order of grids, and this is a stream; allowed: raster")
    if settings.get("per_budget_projector", False):
        raise ValueError(f"{key}.per_budget_projector would break the nesting of order 'haar'; allowed: false")
    counts = [rows * columns for rows, columns in haar_grids(grid)]
    if wrong := [budget for budget in _values(space.trained) if budget not in counts]:
        raise ValueError(
            f"{key}.budgets: {wrong[0]} tokens are no whole grid of a grid of {grid[0]}x{grid[1]} in Haar order; "
            f"allowed: {', '.join(map(str, counts))}"
        )


def _build_stack(
    key: str, space: MediumSpace, settings: Mapping[str, Any], sizes: tuple[int, int], grid: tuple[int, int] | None
) -> Stack:
    _check_kinds(key, space, grid, allowed=("tokens",) if grid else ("rate",))
    budgets = _values(space.trained)
    if grid is None:
        projectors = [_projector(settings, sizes[0] * rate, sizes[1]) for rate in budgets]
        return Stack(projectors=ProjectorBank(projectors, budgets=budgets))
    whole = _whole_blocks(grid)
    if wrong := [budget for budget in budgets if budget not in whole]:
        raise ValueError(
            f"{key}.budgets: {wrong[0]} blocks of whole patches do not tile a grid of {grid[0]}x{grid[1]}; "
            f"allowed: {', '.join(map(str, whole))}"
        )
    projectors = [_projector(settings, sizes[0] * (grid[0] * grid[1] // budget), sizes[1]) for budget in budgets]
    bank = ProjectorBank(projectors, budgets=budgets)
    return Stack(projectors=bank, grid_rows=tuple(whole[budget] for budget in budgets), grid=grid)


def _build_query(
    key: str, space: MediumSpace, settings: Mapping[str, Any], sizes: tuple[int, int], grid: tuple[int, int] | None
) -> Query:
    if settings.get("per_budget_projector", False):
        raise ValueError(f"{key}.per_budget_projector would break the nesting of compressor 'query'; allowed: false")
    if space.max_tokens < 1:
        raise ValueError(f"{key}.num_queries must be at least 1 for compressor 'query', got {space.max_tokens}")
    _check_kinds(key, space, grid, allowed=("tokens",) if grid else ("rate",))
    if grid is None:
        query_grid, feature_grid = (1, space.max_tokens), (1, _window(key, space))
    else:
        query_grid, feature_grid = _query_grid(key, space.max_tokens, grid), grid
    size = settings.get("query_size") or sizes[0]
    return Query(
        in_size=sizes[0],
        out_size=sizes[1],
        query_grid=query_grid,
        feature_grid=feature_grid,
        keys=settings.get("keys", "position"),
        size=size,
        num_heads=settings.get("query_heads") or max(size // 64, 1),
        windowed=grid is None,
    )


def _build_hybrid(
    key: str, space: MediumSpace, settings: Mapping[str, Any], sizes: tuple[int, int], grid: tuple[int, int] | None
) -> Hybrid:
    assert grid is not None  # a stream has no counts, and its space is refused
    if settings.get("per_budget_projector", False):
        raise ValueError(f"{key}.per_budget_projector does not go with compressor 'hybrid'; allowed: false")
    _check_kinds(key, space, grid, allowed=("tokens",))
    anchors, max_tokens = hybrid_sizes(settings, key)
    if anchors[-1] > grid[0] * grid[1]:
        raise ValueError(f"{key}.anchors: {anchors[-1]} cannot be pooled of a grid of {grid[0]}x{grid[1]}")
    projector = _projector(settings, *sizes)
    num_heads = settings.get("query_heads") or max(sizes[0] // 64, 1)
    return Hybrid(
        in_size=sizes[0],
        projector=projector,
        grid=grid,
        anchors=anchors,
        max_tokens=max_tokens,
        num_heads=num_heads,
    )


def _projector(settings: Mapping[str, Any], in_size: int, out_size: int) -> Projector | MixtureProjector:
    def one() -> Projector:
        return Projector(
            in_size=in_size,
            out_size=out_size,
            hidden_size=settings.get("projector_size", out_size),
            norm=settings.get("projector_norm", False),
            activation=settings.get("projector_activation", "gelu"),
        )

    if (num_experts := settings.get("projector_experts")) is None:
        if alone := sorted(set(settings) & set(_MIXTURE)):
            raise ValueError(f"{alone[0]} goes with projector_experts, which is not set")
        return one()
    if num_experts < 1:
        raise ValueError(f"projector_experts is {num_experts}; it must be at least 1")
    return MixtureProjector(
        [one() for _ in range(num_experts)], in_size=in_size, top_k=settings.get("projector_top_k", 2)
    )


def _check_own_grids(key: str, space: MediumSpace, settings: Mapping[str, Any]) -> None:
    """Refuse what needs one grid for all images."""
    if space.compressor not in (allowed := ("pool", "query")):
        raise ValueError(
            f"{key}.compressor {space.compressor!r} needs one grid, and here each image has its own; "
            f"allowed: {', '.join(allowed)}"
        )
    if (order := settings.get("order", "raster")) != "raster":
        raise ValueError(f"{key}.order={order!r} needs one grid, and here each image has its own; allowed: raster")


def _values(amounts: tuple[Amount, ...]) -> tuple[int, ...]:
    return tuple(int(amount.value) for amount in amounts)


def _check_kinds(key: str, space: MediumSpace, grid: tuple[int, int] | None, allowed: tuple[str, ...]) -> None:
    """Refuse trained budgets of a kind, or beyond a size, that this compressor never serves."""
    kind = space.trained[0].kind
    if kind not in allowed:
        names = {"tokens": "counts (64)", "rate": "rates (/4)"}
        what = "a grid" if grid else "a stream"
        raise ValueError(
            f"{key}.budgets are {names[kind]}; compressor {space.compressor!r} on {what} takes "
            f"{' or '.join(names[name] for name in allowed)}"
        )
    if grid is not None:
        most = space.max_tokens if space.compressor in ("query", "hybrid") else grid[0] * grid[1]
        if (largest := max(_values(space.trained))) > most:
            raise ValueError(f"{key}.budgets: {largest} tokens cannot be met; allowed are counts 1..{most}")


def _window(key: str, space: MediumSpace) -> int:
    """Frames per window, after a check that every trained rate divides it into no more tokens than queries."""
    window = space.window_frames
    if window < 1:
        raise ValueError(f"{key}.window_frames must be at least 1 for compressor 'query' on a stream, got {window}")
    for rate in _values(space.trained):
        if window % rate or window // rate > space.max_tokens:
            raise ValueError(
                f"{key}.budgets: /{rate} must divide window_frames={window} into at most "
                f"num_queries={space.max_tokens} tokens"
            )
    return window


def _whole_blocks(grid: tuple[int, int]) -> dict[int, int]:
    """Counts of equal blocks of whole patches that tile a grid, each with the rows they form; see `grid_rows`."""
    counts = torch.arange(1, grid[0] * grid[1] + 1, device="cpu")
    rows = grid_rows(counts, grid).tolist()
    return {
        count: row
        for count, row in enumerate(rows, start=1)
        if count % row == 0 and grid[0] % row == 0 and grid[1] % (count // row) == 0
    }


def _query_grid(key: str, num_queries: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the queries: the factors of M closest to the shape of the feature grid.

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
            f"{key}.num_queries={num_queries} forms no grid like {grid[0]}x{grid[1]}; "
            f"the nearest that do: {', '.join(map(str, near))}"
        )
    return rows, num_queries // rows
