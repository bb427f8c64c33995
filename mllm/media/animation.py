"""Reads the frames of an animated GIF, WebP or PNG, as those of a video.

Each frame is what is seen at its time, on white where it is transparent. A frame without a duration lasts a tenth of a
second, as browsers show it.

Knows Pillow's sequences. Does not know which frames are wanted.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import numpy as np
from PIL import Image

from mllm.media.errors import MediaError
from mllm.media.image import opened, to_rgb
from mllm.media.limits import MediaLimits, decoding

KINDS = ("gif", "webp", "png")
TICK_SECONDS = Fraction(1, 1_000_000)
_UNSTATED_MILLISECONDS = 100


def is_animated(name: str, file: BinaryIO, kind: str, limits: MediaLimits) -> bool:
    """Tell whether an image holds more than one frame.

    Raises:
        MediaError: its header cannot be read, or its pixels are too many or of a kind that is not read.
    """
    with opened(name, file, kind, limits) as image, decoding(name):
        animated = bool(getattr(image, "is_animated", False))
    file.seek(0)
    return animated


def animation_frames(name: str, file: BinaryIO, kind: str, limits: MediaLimits) -> Iterator[tuple[np.ndarray, int]]:
    """Yield frames (H, W, 3) uint8 RGB in order, and for how many ticks each is seen.

    Raises:
        MediaError: corrupt, or limit.
    """
    with opened(name, file, kind, limits) as image:
        number = int(getattr(image, "default_image", False))  # a PNG's image for programs that show no animations
        while _seek(name, image, number):
            with decoding(name):
                image.load()
                shown = np.asarray(to_rgb(image))
                milliseconds = image.info.get("duration") or _UNSTATED_MILLISECONDS
                ticks = max(1, round(float(milliseconds) * 1000))
            yield shown, ticks
            number += 1


def _seek(name: str, image: Image.Image, number: int) -> bool:
    """Go to a frame; False behind the last."""
    try:
        image.seek(number)
    except EOFError:
        return False
    except Exception as error:
        raise MediaError("corrupt", name, "the decoder could not read the file") from error
    return True
