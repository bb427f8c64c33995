"""Reads HEIC and HEIF, which phones photograph in, by pillow-heif: an optional library, imported when such a file
comes.

Knows that library. Does not know other formats.
"""

from typing import Any, BinaryIO

from PIL import Image

from mllm.media.errors import MediaError
from mllm.media.limits import decoding
from mllm.utils.extras import install_line


def open_heif(name: str, file: BinaryIO) -> Any:
    """Return the primary image of a file, not unpacked yet: it has `size`, upright, and `to_pillow()`.

    Raises:
        MediaError: unsupported (the library is not installed) or corrupt.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise MediaError("unsupported", name, f"HEIC is read with pillow-heif: {install_line('heif')}") from error
    pillow_heif.options.DECODE_THREADS = 1  # data loader workers already fill the cores
    with decoding(name):
        return pillow_heif.open_heif(file, convert_hdr_to_8bit=True)


def unpacked(name: str, image: Any) -> Image.Image:
    """Return the pixels of what `open_heif` gave; its rotation, which the format states itself, is applied.

    Raises:
        MediaError: corrupt.
    """
    with decoding(name):
        return image.to_pillow()
