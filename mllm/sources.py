"""Where the frozen parts of a model come from: a folder, a name on the hub, or a part of the built-in world.

Knows names and files. Does not know what a part computes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

WORLD_PREFIX = "world:"
RUN_PREFIX = "run:"
"""Before the name of a folder inside the run folder itself, which may be moved with it."""
WORLD_PARTS = ("llm", "vision", "audio", "lips")


def resolve_source(reference: str) -> str:
    """The folder of a `world:` part, a local folder as it is, or the reference itself as a hub name.

    Raises:
        ValueError: a `world:` part that does not exist.
    """
    if not reference.startswith(WORLD_PREFIX):
        return reference
    part = reference.removeprefix(WORLD_PREFIX)
    if part not in WORLD_PARTS:
        raise ValueError(f"{reference!r} is no part of the built-in world; allowed: {', '.join(WORLD_PARTS)}")
    return str(Path(__file__).parent / "world" / "assets" / part)


def within_run(sources: Mapping[str, Mapping[str, str]], folder: str | Path) -> dict[str, dict[str, str]]:
    """Sources of a run with the parts that lie in its own folder found there."""
    found = {part: dict(own) for part, own in sources.items()}
    for own in found.values():
        if own["reference"].startswith(RUN_PREFIX):
            own["reference"] = str(Path(folder) / own["reference"].removeprefix(RUN_PREFIX))
    return found


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""What hubs call the weights of a model: one file, or several and an index of what is where; and what is never read."""


def shard_names(index: Path) -> list[str]:
    """Read which files an index of weights names, each once.

    Raises:
        ValueError: a file that is no such index, or that names files elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} holds no weight_map of names and files") from error
    if foreign := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index} names {foreign[0]!r}, which is no file beside it")
    return names


def weight_files(folder: str | Path) -> list[Path]:
    """List the safetensors files that hold the model of a local folder; none where it holds no such weights.

    Raises:
        ValueError: an index that names files which are not there.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return []
    names = shard_names(index)
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{index} names {absent[0]}, which is not there ({len(absent)} of {len(names)} files are not)")
    return [folder / name for name in names]


def digest_of(folder: str | Path) -> str:
    """Compute the SHA-256 over the files of `weight_files`, names and contents; empty where there are none."""
    files = weight_files(folder)
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
