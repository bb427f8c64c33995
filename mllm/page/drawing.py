"""Draws what a page shows: the image with what its soft tokens cover, and the budgets side by side.

Knows pixels, weights and answers. Does not know models or requests. matplotlib is imported when a plot is drawn.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor

SIDE_PIXELS = 384
"""Least length of the longer side of an overlay."""
_HEAT = (255, 60, 0)
_LINE = (255, 255, 255)
_DIM = 0.35
MAX_ANSWER_CHARS = 28


def draw_overlay(pixels: Tensor, owners: Tensor, weights: Tensor | None) -> Image.Image:
    """Draw an image with the borders between the areas of its soft tokens, and what one of them covers.

    Args:
        pixels: (3, height, width) in 0..1, what the encoder sees.
        owners: (H, W), the token that each patch belongs to; borders lie between patches of different ones.
        weights: (H, W) of one token, its largest weight fully coloured; None colours none.
    """
    page = _image_of(pixels, owners.shape)
    if weights is not None:
        heat = weights / weights.max().clamp(min=1e-12)
        alpha = (255 * heat).round().to(torch.uint8).numpy()
        mask = Image.fromarray(alpha).resize(page.size, Image.Resampling.NEAREST)
        dark = ImageEnhance.Brightness(page).enhance(_DIM)
        tinted = Image.blend(page, Image.new("RGB", page.size, _HEAT), 0.45)
        page = Image.composite(tinted, dark, mask)
    _draw_borders(page, owners)
    return page


def data_url(image: Image.Image) -> str:
    """Write an image as the address of itself, in PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _image_of(pixels: Tensor, grid: Sequence[int]) -> Image.Image:
    """Enlarge pixels to whole pixels per patch, so that borders are straight."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    rows, columns = grid
    per_patch = max(-(-max(SIDE_PIXELS, *values.shape[:2]) // max(rows, columns)), 1)
    return Image.fromarray(values).resize((columns * per_patch, rows * per_patch), Image.Resampling.BICUBIC)


def _draw_borders(page: Image.Image, owners: Tensor) -> None:
    pen, (rows, columns) = ImageDraw.Draw(page), owners.shape
    high, wide = page.height // rows, page.width // columns
    for row, column in (owners[1:] != owners[:-1]).nonzero().tolist():
        pen.line([(column * wide, (row + 1) * high), ((column + 1) * wide, (row + 1) * high)], _LINE, 1)
    for row, column in (owners[:, 1:] != owners[:, :-1]).nonzero().tolist():
        pen.line([((column + 1) * wide, row * high), ((column + 1) * wide, (row + 1) * high)], _LINE, 1)


def plot_budgets(budgets: Sequence[str], tokens: Sequence[int], answers: Sequence[str]) -> Any:
    """Draw soft tokens by budget as bars that carry their answers; equal answers have one colour.

    Returns:
        a figure of matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.9 + 0.36 * len(budgets)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axis = figure.subplots()
    different = list(dict.fromkeys(answers))
    colours = colormaps["tab10"](np.arange(len(different)) % 10)
    positions = np.arange(len(budgets))
    bars = axis.barh(positions, tokens, color=[colours[different.index(answer)] for answer in answers])
    axis.bar_label(bars, [f" {count}: {_short(answer)}" for count, answer in zip(tokens, answers, strict=True)])
    axis.set_yticks(positions, budgets)
    axis.invert_yaxis()  # in the order of the table
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xticks(ticks := sorted(set(tokens)), list(map(str, ticks)))
    axis.minorticks_off()
    axis.set_xlim(0, max(tokens) * 60)  # room for the answers
    axis.set_xlabel("soft tokens")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _short(answer: str) -> str:
    # A dollar would begin a formula.
    line = " ".join(answer.split()).replace("$", r"\$")
    return line if len(line) <= MAX_ANSWER_CHARS else f"{line[: MAX_ANSWER_CHARS - 1]}…"
