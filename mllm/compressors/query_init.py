"""Initialises queries on images so that query i reads one cell: the whole image, then its quarters, and so on.

Knows one query compressor and cells of a grid. Does not know images, losses or the LLM.

The released initialisation (see `query.py`) lets every query look at everything about equally, and training must part
them. Here the first query reads the mean of all features, the next three a quarter each, the next twelve a sixteenth
each: of the four parts of a cell three are read, for the fourth follows from them and the whole. So the first 1, 4, 16,
64, ... queries hold what a pooled grid of that many cells holds, which is what nested budgets ask of them. Values pass
unchanged, and all heads look at the same cells. It is an initialisation only; everything trains on from there.

Shapes: M queries, T features of the grid, C size of queries.
"""

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional

from mllm.compressors.query import Query

Cell = tuple[int, int, int, int]
"""First row, row behind the last, first column, column behind the last."""
NUM_STEPS = 300
SHARPNESS = 10.0
"""Sharpness of the attention that the search begins with; the search itself changes it."""


def pyramid_cells(num_cells: int, grid: tuple[int, int]) -> list[Cell]:
    """Lists the cells of the first queries, coarse to fine; where the grid has no more of them they begin anew."""
    level: list[Cell] = [(0, grid[0], 0, grid[1])]
    cells = list(level)
    while len(cells) < num_cells:
        children = [part for cell in level for part in _parts(cell)]
        if len(children) == len(level):  # single features: those not read yet, then all over again
            cells += [cell for cell in level if cell not in cells] or cells
        for cell in level:
            cells += _parts(cell)[:-1]
        level = children
    return cells[:num_cells]


def _parts(cell: Cell) -> list[Cell]:
    """Halves a cell along each axis it can be halved along, and lists the parts in reading order."""
    top, bottom, left, right = cell
    row_cuts = [top, (top + bottom) // 2, bottom] if bottom - top > 1 else [top, bottom]
    column_cuts = [left, (left + right) // 2, right] if right - left > 1 else [left, right]
    return [
        (row_cuts[i], row_cuts[i + 1], column_cuts[j], column_cuts[j + 1])
        for i in range(len(row_cuts) - 1)
        for j in range(len(column_cuts) - 1)
    ]


def initialise_as_pyramid(compressor: Query, generator: torch.Generator) -> Tensor:
    """Initialises a query compressor with position keys as a pyramid of cells, in place.

    The weights of queries and keys are searched for by gradient descent on the divergence of the attention from the
    cells; with 64 queries on 64 features that takes half a second. The search is in float32 whatever the weights are,
    for its steps are too small for bfloat16; the result is rounded to their dtype.

    Args:
        generator: random numbers for the directions in which heads look.

    Returns:
        (M,) what is left of the divergence with the weights as they are now, in nats.

    Raises:
        ValueError: content keys or a stream, whose attention does not depend on cells alone.
    """
    if compressor.windowed or compressor.keys != "position":
        raise ValueError("compressor.start pyramid goes with images and keys: position; leave it out")
    precise = copy.deepcopy(compressor).float().requires_grad_()
    attention = precise.attn
    size = attention.out_proj.in_features
    grid = precise.feature_grid
    wanted = _attention_on(pyramid_cells(precise.num_queries, grid), grid).to(precise.query)
    with torch.no_grad():
        # Queries and keys get the same random rotation, so that a query at the mean of some positions looks at them;
        # the rotation mixes positions over the heads, and values and output are the identity.
        directions = torch.linalg.qr(torch.randn(size, size, generator=generator))[0] * math.sqrt(SHARPNESS)
        attention.in_proj_weight.copy_(torch.cat([directions, directions, torch.eye(size)]))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(torch.eye(size))
        attention.out_proj.bias.zero_()
        precise.query.copy_(wanted @ precise.key_positions() - precise.pos_embed)
    _search(precise, wanted)
    with torch.no_grad():
        for parameter, precise_parameter in zip(compressor.parameters(), precise.parameters(), strict=True):
            parameter.copy_(precise_parameter)
            precise_parameter.copy_(parameter)
        return _divergence(precise, wanted).mean(0)


def _attention_on(cells: list[Cell], grid: tuple[int, int]) -> Tensor:
    """Builds the attention (M, T) that averages over each cell."""
    wanted = torch.zeros(len(cells), *grid)
    for row, (top, bottom, left, right) in zip(wanted, cells, strict=True):
        row[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
    return wanted.flatten(1)


def _search(compressor: Query, wanted: Tensor) -> None:
    """Fits queries and keys by Adam with a falling rate; the values' part of the weights gets no gradient."""
    searched = [compressor.query, compressor.attn.in_proj_weight]
    optimizer = torch.optim.Adam(searched, lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=NUM_STEPS)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        with torch.enable_grad():
            _divergence(compressor, wanted).mean().backward()
        optimizer.step()
        schedule.step()


def _divergence(compressor: Query, wanted: Tensor) -> Tensor:
    """Computes (h, M): how far each head of each query is from where it should look."""
    num_heads = compressor.attn.num_heads
    states = (compressor.ln_q(compressor.query + compressor.pos_embed), compressor.ln_k(compressor.key_positions()))
    queries, keys = (
        functional.linear(positions, weight).unflatten(1, (num_heads, -1)).transpose(0, 1)
        for positions, weight in zip(states, compressor.attn.in_proj_weight.chunk(3), strict=False)
    )
    logs = (queries @ keys.mT * queries.shape[-1] ** -0.5).log_softmax(-1)
    return (torch.special.xlogy(wanted, wanted) - wanted * logs).sum(-1)
