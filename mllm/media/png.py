"""Removes from a PNG what says nothing about its pixels: colour profiles and texts, which may be of any size.

Pillow refuses an image whose profile or text unpacks to more than a megabyte, although neither is looked at. The texts
that may say which side is up are kept while they are not large.

Knows chunks. Does not unpack images.
"""

import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_SIGNATURE_BYTES = 8
_HEAD_BYTES, _CRC_BYTES = 8, 4
_MAX_TEXT_BYTES = 2**18
_WITH_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")


def without_notes(file: BinaryIO) -> BinaryIO:
    """Return the same image without profiles and texts; the very file where it has none.

    Args:
        file: a PNG, at its start.
    """
    chunks = list(_chunks(file))
    dropped = [chunk for chunk in chunks if _is_note(file, *chunk)]
    file.seek(0)
    if not dropped:
        return file
    plain, position = io.BytesIO(), 0
    for _, start, size in dropped:
        plain.write(file.read(start - position))
        position = start + size
        file.seek(position)
    plain.write(file.read())
    plain.seek(0)
    return plain


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, first byte and length of every chunk that the file holds whole."""
    end = file.seek(0, io.SEEK_END)
    position = _SIGNATURE_BYTES
    while position + _HEAD_BYTES <= end:
        file.seek(position)
        head = file.read(_HEAD_BYTES)
        size = int.from_bytes(head[:4], "big") + _HEAD_BYTES + _CRC_BYTES
        if position + size > end:  # cut off: the decoder will say so
            return
        yield head[4:], position, size
        position += size


def _is_note(file: BinaryIO, kind: bytes, start: int, size: int) -> bool:
    if kind == b"iCCP":
        return True
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return False
    file.seek(start + _HEAD_BYTES)
    content = file.read(size - _HEAD_BYTES - _CRC_BYTES)
    keyword = next((prefix for prefix in _WITH_ORIENTATION if content.startswith(prefix)), None)
    return keyword is None or len(content) > _MAX_TEXT_BYTES or _unpacks_large(kind, content[len(keyword) :])


def _unpacks_large(kind: bytes, rest: bytes) -> bool:
    """Tell whether a packed text is large; `rest` follows its keyword."""
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return False
    # zTXt: one byte of method. iTXt: flag, method, language and translated keyword, both ended by a zero byte.
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, _MAX_TEXT_BYTES + 1)) > _MAX_TEXT_BYTES
    except zlib.error:
        return True
