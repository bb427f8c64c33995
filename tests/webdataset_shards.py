"""Writes tars in the form that the webdataset library's ShardWriter gives them (version 1.0.2).

Members of a sample follow each other in order of their suffixes, each behind a pax header, since times are fractions of
a second; owned by bigdata, readable by all.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MTIME = 1795993920.3970942


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes | dict[str, Any]]]) -> Path:
    """Write samples, by key and suffix; objects become JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples.items():
            for suffix in sorted(members):
                value = members[suffix]
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime, info.mode = len(content), MTIME, 0o444  # type: ignore[assignment]
                info.uname = info.gname = "bigdata"
                tar.addfile(info, io.BytesIO(content))
    return path


def write_texts(folder: Path, sizes: Sequence[int]) -> list[str]:
    """Write shards of so many conversations without media each; returns the ids of all."""
    number, ids = 0, []
    for shard, size in enumerate(sizes):
        samples = {}
        for _ in range(size):
            samples[key := f"{number:09d}"] = {"json": {"question": "red" * (number % 7 + 1), "answer": "blue now"}}
            ids.append(key)
            number += 1
        write_shard(folder / f"{shard:06d}.tar", samples)
    return ids
