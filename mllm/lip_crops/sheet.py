"""Draws images for people: a strip per clip, with its frame and some of its crops, and all strips on one sheet.

Knows how to draw them. Does not know how crops are made.

Shapes: H rows and W columns of a frame, T crops of side S.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mllm.lip_crops.geometry import CROP_PIXELS

NUM_CROPS = 8
_FRAME_WIDTH, _TEXT_HEIGHT, _GAP = 172, 16, 2
_STRIP_SIZE = (_FRAME_WIDTH + NUM_CROPS * (CROP_PIXELS + _GAP), CROP_PIXELS + _TEXT_HEIGHT)


def draw_strip(frame: np.ndarray, square: tuple[complex, complex] | None, crops: np.ndarray, text: str) -> Image.Image:
    """Draw one clip on one line.

    Args:
        frame: one frame of it, uint8 (H, W, 3).
        square: factor and centre of the crop in that frame (see `CropPath`), drawn as a square; None for no crop.
        crops: uint8 (T, S, S) or (T, S, S, 3), of which some are shown, evenly chosen; may be empty.
        text: stands above.
    """
    strip = Image.new("RGB", _STRIP_SIZE, "white")
    ImageDraw.Draw(strip).text((2, 1), text, fill="black", font=ImageFont.load_default(11))
    image = Image.fromarray(np.ascontiguousarray(frame))
    scale = min(_FRAME_WIDTH / image.width, CROP_PIXELS / image.height)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if square is not None:
        half = CROP_PIXELS / 2
        corners = [(square[1] + corner * half / square[0]) * scale for corner in (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j)]
        ImageDraw.Draw(small).polygon([(corner.real, corner.imag) for corner in corners], outline="lime")
    strip.paste(small, (0, _TEXT_HEIGHT))
    chosen = np.linspace(0, len(crops) - 1, min(NUM_CROPS, len(crops))).round().astype(int)
    for position, number in enumerate(chosen):
        left = _FRAME_WIDTH + _GAP + position * (CROP_PIXELS + _GAP)
        strip.paste(Image.fromarray(crops[number]).convert("RGB"), (left, _TEXT_HEIGHT))
    return strip


def draw_sheet(strips: Sequence[Path]) -> Image.Image:
    """Paste strips below each other."""
    sheet = Image.new("RGB", (_STRIP_SIZE[0], len(strips) * _STRIP_SIZE[1]), "white")
    for position, path in enumerate(strips):
        with Image.open(path) as strip:
            sheet.paste(strip, (0, position * _STRIP_SIZE[1]))
    return sheet
