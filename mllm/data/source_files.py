"""Reads small text files, and says where a file lies below the root that samples name their media from.

Knows paths and UTF-8. Does not know formats.
"""

import os
from pathlib import Path


def read_text(path: Path) -> str:
    """Read a small text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8; the file is named.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start + 1}") from error


def below_root(root: str | os.PathLike[str], path: str) -> str:
    """Return an absolute path, or a file:// URL, that lies below the root as the path relative to it.

    Others are returned as they are, for `path_problem` to refuse: nothing is read outside of the root.
    """
    absolute = path.removeprefix("file://")
    if not os.path.isabs(absolute):
        return path
    relative = os.path.relpath(absolute, os.path.abspath(root))
    return path if relative.split(os.sep)[0] in ("..", ".") else Path(relative).as_posix()


def relative_to(root: Path, path: Path) -> str:
    """Return a path relative to the root above it, as manifests write it.

    Raises:
        ValueError: it is not below the root.
    """
    try:
        return Path(os.path.abspath(path)).relative_to(os.path.abspath(root)).as_posix()
    except ValueError as error:
        raise ValueError(f"{path} is not under the root {root}") from error
