"""Says which files may be opened: regular ones under a declared root.

Knows file names and links. Does not open files and does not know formats.
"""

import os
import re
import stat
from pathlib import Path

from mllm.media.errors import MediaError
from mllm.media.packed import packed_location, packed_path

# What most paths look like, to be done with them at once: words with dots and dashes inside, parted by slashes.
_PLAIN = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*")


def resolve_media(root: str | os.PathLike[str], relative: str) -> Path:
    """Return the real path of a media file under `root`.

    Symbolic links are followed as long as they end inside the root. A hard link cannot be told from its target. Of a
    medium inside a tar or a table (see `packed.py`), that file is looked up.

    Raises:
        MediaError: "refused" for a path that is absolute, climbs, or leads out of the root by a link, and for anything
            but a regular file (folder, FIFO, device, socket); "missing" when there is no such file.
    """
    return Path(RootedPaths(root).resolve(relative))


class RootedPaths:
    """Resolves many files in one pass as `resolve_media` does: the real path of each folder is looked up once.

    For a short pass over a manifest. A long-lived process should not keep one, since a folder can be exchanged.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self._real_folders: dict[str, str] = {}

    def resolve(self, relative: str) -> str:
        """Return the real path of a file; see `resolve_media`."""
        if problem := path_problem(relative):
            raise MediaError("refused", relative, problem)
        try:
            candidate, mode = self._follow(relative)
        except (FileNotFoundError, NotADirectoryError) as error:
            if (location := packed_location(relative)) is not None:
                self.resolve(location.file)
                # A cache may keep the file under a name that does not say what it is; this one does.
                return packed_path(f"{self._real_folder('')}/{location.file}", *location.numbers)
            raise MediaError("missing", relative, "there is no such file under the root") from error
        except OSError as error:
            raise MediaError("refused", relative, "the path cannot be followed") from error
        if not candidate.startswith(self._real_folder("").rstrip("/") + "/"):
            raise MediaError("refused", relative, "the path leads out of the root by a symbolic link")
        if not stat.S_ISREG(mode):
            raise MediaError("refused", relative, "not a regular file")
        return candidate

    def _follow(self, relative: str) -> tuple[str, int]:
        """Return the path without links, and the mode of what stands there."""
        parent, _, name = relative.rpartition("/")
        candidate = f"{self._real_folder(parent)}/{name}"
        mode = os.lstat(candidate).st_mode
        if not stat.S_ISLNK(mode):
            return candidate, mode
        candidate = os.path.realpath(candidate, strict=True)
        return candidate, os.lstat(candidate).st_mode

    def _real_folder(self, parent: str) -> str:
        if parent not in self._real_folders:
            self._real_folders[parent] = os.path.realpath(os.path.join(self.root, parent), strict=True)
        return self._real_folders[parent]


def path_problem(relative: str) -> str | None:
    """Say what is wrong with a path as text, or None. Backslashes are refused: other systems read them as
    separators.
    """
    if _PLAIN.fullmatch(relative):
        return None
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
