"""Where the frozen parts of a model come from: a folder, a name on the hub, or a part of the built-in world.

Knows names and files. Does not know what a part computes.
"""

import hashlib
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


def digest_of(folder: str | Path) -> str:
    """SHA-256 over the safetensors files of a local folder, by name; empty for anything that is not a folder."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
