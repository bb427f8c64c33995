"""Keeps the files that browsers send to a page: in a folder of its own, the newest ones up to a number of bytes.

Knows a folder. Does not know what files hold.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from mllm.serving.errors import bad_request


class Uploads:
    """A folder of uploaded files.

    Args:
        folder: holds nothing else.
        max_bytes: of all files; the oldest make room for new ones.
    """

    def __init__(self, folder: str, *, max_bytes: int) -> None:
        self.folder = os.path.realpath(folder)
        self.max_bytes = max_bytes

    def holds(self, path: object) -> bool:
        """Tell whether something is the path of a file below the folder, whatever links say."""
        if not isinstance(path, str) or "\0" in path:
            return False
        real = os.path.realpath(path)
        return real.startswith(self.folder + os.sep)

    def read(self, value: Any, medium: str) -> bytes | None:
        """Read the file that a page names, None where it names none.

        Raises:
            RequestError: 400, there is no such file any more, or it is none of the folder.
        """
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        if self.holds(path):
            assert isinstance(path, str)
            with contextlib.suppress(OSError):
                return Path(path).read_bytes()
        raise bad_request(f"the {medium} is not there any more; choose the file again", medium)

    def make_room(self, num_bytes: int) -> None:
        """Remove the oldest files until so many bytes may come."""
        files = [Path(folder) / name for folder, _, names in os.walk(self.folder) for name in names]
        sizes: dict[Path, tuple[float, int]] = {}
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                sizes[file] = (status.st_mtime, status.st_size)
        left = sum(size for _, size in sizes.values())
        for file, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if left + num_bytes <= self.max_bytes:
                return
            file.unlink(missing_ok=True)
            left -= size
