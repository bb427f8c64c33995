"""Says which shards a name stands for: files of a disk, by `*` and braces, and likewise those that a hub lists.

Knows names and patterns. Does not know what shards hold.
"""

import glob
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mllm.data.findings import first_lines

_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^{}]*\{")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
MAX_SHARDS = 1_000_000


def is_pattern(name: str) -> bool:
    """Tell whether a name may stand for several."""
    return bool(_BRACES.search(name) or _WILD.search(name))


def shard_files(name: str) -> list[Path]:
    """Return the files that a name stands for: itself, or those of a pattern.

    Args:
        name: `*`, `?` and `[...]` stand for what is there; {a,b} and {000..099} for names each of which must be there.

    Raises:
        ValueError: braces inside braces, or a pattern that makes too many names.
        FileNotFoundError: there is no such file, or one of several is not there.
    """
    files = []
    missing = []
    for one in [name] if os.path.isfile(name) else _expanded(name):
        matches = sorted(glob.glob(one, recursive=True)) if _WILD.search(one) and not os.path.isfile(one) else [one]
        files += matches
        missing += [one] if not matches else [match for match in matches if not os.path.isfile(match)]
    if missing:
        raise FileNotFoundError("data.train: there is no such shard:\n" + "\n".join(first_lines(missing)))
    return [Path(file) for file in files]


def listed_shards(name: str, files: Sequence[str]) -> list[str]:
    """Return which of some files a name stands for, as `shard_files` does for those of a disk.

    Args:
        name: also a folder, for all that lie in it and below; all files where it is empty.
        files: paths with slashes, in order.

    Raises:
        ValueError, FileNotFoundError: see there.
    """
    if not name:
        return list(files)
    known = set(files)
    found: list[str] = []
    missing: list[str] = []
    for one in [name] if name in known else _expanded(name):
        matches = [one] if one in known else [file for file in files if file.startswith(f"{one.rstrip('/')}/")]
        if not matches and _WILD.search(one):
            matches = sorted(file for file in files if _matches(file.split("/"), one.split("/")))
        found += matches
        missing += [] if matches else [one]
    if missing:
        raise FileNotFoundError("data.train: there is no such shard:\n" + "\n".join(first_lines(missing)))
    return found


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Tell whether a path fits a pattern, part by part; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[number:], pattern[1:]) for number in range(len(parts) + 1))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _expanded(name: str) -> list[str]:
    """Write out the braces of a name."""
    if _NESTED.search(name):
        raise ValueError(f"data.train: {name} holds braces inside braces; write them apart")
    names = [name]
    while match := _BRACES.search(names[0]):
        values = _values(match[1])
        if len(names) * len(values) > MAX_SHARDS:
            raise ValueError(f"data.train: {name} stands for more than {MAX_SHARDS} names")
        names = [_BRACES.sub(lambda _, value=value: value, one, count=1) for one in names for value in values]
    return names


def _values(inside: str) -> list[str]:
    if span := _RANGE.fullmatch(inside):
        first, last = int(span[1]), int(span[2])
        # Zeros in front say how long a number is, as in a shell.
        width = max(map(len, span.groups())) if any(len(end) > 1 and end[0] == "0" for end in span.groups()) else 0
        step = 1 if last >= first else -1
        if abs(last - first) >= MAX_SHARDS:
            raise ValueError(f"data.train: {{{inside}}} stands for more than {MAX_SHARDS} names")
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return inside.split(",")
