"""A picture file to an upright 8-bit RGB picture.

Reads JPEG, PNG, WebP, BMP and GIF with Pillow; says what is done with rotation tags, alpha, palettes and 16 bits.
Does not know sizes or normalisations an encoder wants (`transforms.py` does).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mllm.media.errors import MediaError
from mllm.media.limits import DEFAULT_LIMITS, MediaFile, MediaLimits, decoding, media_name, open_media, sniff

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B")
"""Pixel layouts that are read. The 32-bit ones have no agreed white, so they are refused."""


def load_image(path: MediaFile, *, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read a picture as RGB.

    EXIF rotation is applied. Transparency is composited on white. 16-bit grey is divided by 257 and rounded, so that
    65535 becomes 255 (Pillow itself would clip it); 16-bit colour keeps its high byte. CMYK is converted without a
    colour profile. Of a multi-picture JPEG, which phones write, the first picture counts; animations are refused.

    Returns:
        an RGB picture of the upright width and height.

    Raises:
        MediaError: missing, refused, unsupported (another format, animation, pixel layout), corrupt, empty, or limit
            (bytes, or pixels as the header gives them before anything is unpacked).
    """
    name = media_name(path)
    with open_media(path, limits.image_bytes, "image_bytes") as file:
        container = sniff(file)
        if container is None or container[0] != "image":
            raise MediaError("unsupported", name, f"not a picture in one of the formats {', '.join(FORMATS)}")
        return _read(name, file, limits)


def header_pixels(path: MediaFile, *, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Upright height and width of a picture as its header states them, without unpacking it.

    Raises:
        MediaError: as `load_image`, as far as the header shows it.
    """
    name = media_name(path)
    with open_media(path, limits.image_bytes, "image_bytes") as file:
        container = sniff(file)
        if container is None or container[0] != "image":
            raise MediaError("unsupported", name, f"not a picture in one of the formats {', '.join(FORMATS)}")
        with _opened(name, file, limits) as image, decoding(name):
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)


def _read(name: str, file: BinaryIO, limits: MediaLimits) -> Image.Image:
    with _opened(name, file, limits) as image, decoding(name):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


@contextmanager
def _opened(name: str, file: BinaryIO, limits: MediaLimits) -> Iterator[Image.Image]:
    """A picture that has been looked at and not unpacked."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name, limits) from error
    except Exception as error:
        raise MediaError("corrupt", name, "the header of the picture cannot be read") from error
    with image:
        if image.width * image.height > limits.image_pixels:
            raise _too_large(name, limits)
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise MediaError("unsupported", name, "animated pictures are not read")
        if image.mode not in MODES:
            raise MediaError("unsupported", name, f"pixels must be of one of the kinds {', '.join(MODES)}")
        yield image


def _too_large(name: str, limits: MediaLimits) -> MediaError:
    return MediaError("limit", name, f"the picture has more than {limits.image_pixels} pixels (limits.image_pixels)")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as 8-bit RGB; see `load_image` for transparency and 16 bits."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        page = Image.new("RGB", layer.size, "white")
        page.paste(layer, mask=layer.getchannel("A"))
        return page
    return image.convert("RGB")
