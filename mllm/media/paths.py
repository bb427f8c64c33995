"""Which files may be opened: regular ones under a declared root.

Knows file names and links. Does not open files and does not know formats.
"""

import os
import stat
from functools import lru_cache
from pathlib import Path

from mllm.media.errors import MediaError


def resolve_media(root: str | os.PathLike[str], relative: str) -> Path:
    """The real path of a media file under `root`.

    Symbolic links are followed as long as they end inside the root. A hard link cannot be told from its target.

    Raises:
        MediaError: "refused" for a path that is absolute, climbs, or leads out of the root by a link, and for anything
            but a regular file (folder, FIFO, device, socket); "missing" when there is no such file.
    """
    if problem := path_problem(relative):
        raise MediaError("refused", relative, problem)
    parent, _, name = relative.rpartition("/")
    try:
        real_root, folder = _real_folder(os.fspath(root), parent)
        candidate = os.path.join(folder, name)
        status = os.lstat(candidate)
        if stat.S_ISLNK(status.st_mode):
            candidate = os.path.realpath(candidate, strict=True)
            status = os.lstat(candidate)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError("missing", relative, "there is no such file under the root") from error
    except OSError as error:
        raise MediaError("refused", relative, "the path cannot be followed") from error
    if os.path.commonpath([real_root, candidate]) != real_root:
        raise MediaError("refused", relative, "the path leads out of the root by a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("refused", relative, "not a regular file")
    return Path(candidate)


def path_problem(relative: str) -> str | None:
    """What is wrong with a path as text, or None. Backslashes are refused: other systems read them as separators."""
    if not relative or relative != relative.strip():
        return "the path must not be empty or begin or end with a blank"
    if not relative.isprintable():
        return "the path must not hold control characters"
    if "\\" in relative or "://" in relative or relative[1:2] == ":":
        return "the path must be a plain relative one with forward slashes, not a URL or a drive"
    if relative.startswith(("/", "~")):
        return "the path must be relative to the root"
    if any(part in ("", ".", "..") for part in relative.split("/")):
        return "the path must not hold '..', '.' or empty parts"
    return None


@lru_cache(maxsize=4096)
def _real_folder(root: str, parent: str) -> tuple[str, str]:
    """Real paths of the root and of a folder below it, remembered because many files share a folder."""
    return os.path.realpath(root, strict=True), os.path.realpath(os.path.join(root, parent), strict=True)
