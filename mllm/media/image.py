"""Decodes an image file to an upright 8-bit RGB image.

Reads JPEG, PNG, WebP, BMP, GIF, TIFF and AVIF with Pillow, HEIC with pillow-heif; says what is done with rotation tags,
alpha, palettes and 16 bits. Does not know sizes or normalisations an encoder wants (`transforms/encoder_inputs.py`
does).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from mllm.media.errors import MediaError
from mllm.media.heif import open_heif, unpacked
from mllm.media.limits import DEFAULT_LIMITS, MediaFile, MediaLimits, decoding, media_name, open_media, sniff
from mllm.media.png import without_notes

_PILLOW = {name: name.upper() for name in ("jpeg", "png", "webp", "bmp", "gif", "tiff", "avif")}
FORMATS = (*_PILLOW.values(), "HEIC")
_BAND_PIXELS = 2**18
_FOUR_BYTES = ("LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B")
"""Pixel layouts that are read. The 32-bit ones have no agreed white, so they are refused."""


def load_image(path: MediaFile, *, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read an image as RGB.

    EXIF rotation is applied. Transparency is composited on white. 16-bit grey is divided by 257 and rounded, so that
    65535 becomes 255 (Pillow itself would clip it); 16-bit colour keeps its high byte. CMYK is converted without a
    colour profile. Of a multi-image JPEG, which phones write, the first image counts, of a HEIC the primary one,
    and of an animation the first frame (`load_video` reads them all). A TIFF of several pages is refused.

    Returns:
        an RGB image of the upright width and height.

    Raises:
        MediaError: missing, refused, unsupported (another format, several pages, pixel layout), corrupt, empty, limit
            (bytes, or pixels as the header gives them before anything is unpacked).
    """
    name = media_name(path)
    with open_media(path, limits.image_bytes, "image_bytes") as file:
        kind = _kind_of(name, file)
        if kind == "heif":
            return to_rgb(unpacked(name, _opened_heif(name, file, limits)))
        with opened(name, file, kind, limits) as image, decoding(name):
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _into_rgb(image)


def header_pixels(path: MediaFile, *, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return the upright height and width of an image as its header states them, without unpacking it.

    Raises:
        MediaError: as `load_image`, as far as the header shows it.
    """
    name = media_name(path)
    with open_media(path, limits.image_bytes, "image_bytes") as file:
        kind = _kind_of(name, file)
        if kind == "heif":
            width, height = _opened_heif(name, file, limits).size
            return height, width
        with opened(name, file, kind, limits) as image, decoding(name):
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)


def _kind_of(name: str, file: BinaryIO) -> str:
    container = sniff(file)
    if container is None or container[0] != "image":
        raise MediaError("unsupported", name, f"not an image in one of the formats {', '.join(FORMATS)}")
    if container[1] == "avif" and not features.check("avif"):
        raise MediaError("unsupported", name, "this Pillow does not read AVIF; 11.3 and later do")
    return container[1]


@contextmanager
def opened(name: str, file: BinaryIO, kind: str, limits: MediaLimits) -> Iterator[Image.Image]:
    """Open an image, whose header is read and whose pixels are not unpacked yet.

    Args:
        kind: what `sniff` found it to be, and Pillow reads.

    Raises:
        MediaError: unsupported, corrupt, or limit.
    """
    try:
        # Named alone, so that Pillow tries no other reader: what `sniff` saw is what it is taken for.
        image = Image.open(without_notes(file) if kind == "png" else file, formats=(_PILLOW[kind],))
        pages = getattr(image, "n_frames", 1) if kind == "tiff" else 1
    except Image.DecompressionBombError as error:
        raise _too_large(name, limits) from error
    except Exception as error:
        raise MediaError("corrupt", name, "the header of the image cannot be read") from error
    with image:
        _check_pixels(name, image.size, limits)
        if pages > 1:  # which of them is meant, nothing says
            raise MediaError("unsupported", name, f"the file has {pages} pages, and only single images are read")
        if image.mode not in MODES:
            raise MediaError("unsupported", name, f"pixels must be of one of the kinds {', '.join(MODES)}")
        yield image


def _opened_heif(name: str, file: BinaryIO, limits: MediaLimits) -> Any:
    """Return the primary image of a HEIC file, once its header is known to state no more pixels than allowed."""
    image = open_heif(name, file)
    _check_pixels(name, image.size, limits)
    return image


def _check_pixels(name: str, size: tuple[int, int], limits: MediaLimits) -> None:
    if size[0] * size[1] > limits.image_pixels:
        raise _too_large(name, limits)


def _too_large(name: str, limits: MediaLimits) -> MediaError:
    return MediaError("limit", name, f"the image has more than {limits.image_pixels} pixels (limits.image_pixels)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to 8-bit RGB; see `load_image` for transparency and 16 bits."""
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        page = Image.new("RGB", image.size)
        for top, layer in _bands(image):
            page.paste(_on_white(layer), (0, top))
        return page
    # Without the copy that `convert` makes where nothing is to be converted.
    return image._new(image.im) if image.mode == "RGB" else image.convert("RGB")


def _into_rgb(image: Image.Image) -> Image.Image:
    """Convert as `to_rgb`, and close, an image that nobody else uses.

    Pillow keeps 4 bytes a pixel of RGB too: where the image has as many, the 3 that count are kept aside while the one
    makes room for the other, so that a large image is never there twice.
    """
    if image.mode not in _FOUR_BYTES or (image.mode == "RGB" and not image.has_transparency_data):
        return to_rgb(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, layer in _bands(image):
        pixels[top : top + layer.height] = np.asarray(to_rgb(layer))
    image.close()
    return Image.fromarray(pixels)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield copies of some rows after the others, with the number of their first; of all there would be a copy more."""
    rows = max(1, _BAND_PIXELS // max(image.width, 1))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(layer: Image.Image) -> Image.Image:
    """Lay a layer on white, as browsers show it; dropping the alpha would bring out colours that nobody sees."""
    layer, page = layer.convert("RGBA"), Image.new("RGB", layer.size, "white")
    page.paste(layer, mask=layer.getchannel("A"))
    return page


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round 16-bit grey to 8 bits."""
    page = Image.new("L", image.size)
    for top, rows in _bands(image):
        page.paste(Image.fromarray(((np.asarray(rows).astype(np.uint32) + 128) // 257).astype(np.uint8)), (0, top))
    return page
