"""Pictures that stand inside tables, written as files under the root, each once.

Knows bytes and names. Does not decode pictures.
"""

import hashlib
import os
from pathlib import Path

from mllm.media import path_problem

FOLDER = "pictures"
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


class PictureFolder:
    """A folder of pictures named by their content, so that one that occurs again is not written again.

    Args:
        root: of the samples.
        folder: relative to it; "pictures" when None.

    Raises:
        ValueError: a folder that leads out of the root.
    """

    def __init__(self, root: Path, folder: str | None) -> None:
        self.folder = FOLDER if folder is None else folder.rstrip("/")
        if problem := path_problem(self.folder):
            raise ValueError(f"images: {problem}, got {self.folder!r}")
        self.root = root

    def write(self, content: bytes) -> str:
        """Write a picture and return its path relative to the root.

        Raises:
            ValueError: bytes that begin like no picture.
        """
        suffix = next((suffix for start, suffix in SUFFIXES.items() if content.startswith(start)), None)
        if suffix is None:
            raise ValueError(f"{len(content)} bytes that begin like no picture")
        name = f"{self.folder}/{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        file = self.root / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.{os.getpid()}")
            aside.write_bytes(content)
            os.replace(aside, file)
        return name
