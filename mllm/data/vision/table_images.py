"""Writes images that stand inside tables as files under the root, each once.

Knows bytes and names. Does not decode images.
"""

import hashlib
import io
from pathlib import Path

from mllm.media import path_problem
from mllm.media.limits import sniff
from mllm.utils.files import written_whole

FOLDER = "images"


class ImageFolder:
    """Writes a folder of images named by their content, so that one that occurs again is not written again.

    Args:
        root: of the samples.
        folder: relative to it; "images" when None.

    Raises:
        ValueError: a folder that leads out of the root.
    """

    def __init__(self, root: Path, folder: str | None) -> None:
        self.folder = FOLDER if folder is None else folder.rstrip("/")
        if problem := path_problem(self.folder):
            raise ValueError(f"images: {problem}, got {self.folder!r}")
        self.root = root

    def write(self, content: bytes) -> str:
        """Write an image and return its path relative to the root.

        Raises:
            ValueError: bytes that begin like no image.
        """
        container = sniff(io.BytesIO(content[:64]))
        if container is None or container[0] != "image":
            raise ValueError(f"{len(content)} bytes that begin like no image")
        suffix = "jpg" if container[1] == "jpeg" else container[1]
        name = f"{self.folder}/{hashlib.sha256(content).hexdigest()[:24]}.{suffix}"
        file = self.root / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file, concurrent=True) as aside:
                aside.write_bytes(content)
        return name
