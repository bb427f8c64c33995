"""Says where the frozen parts of a model come from: a folder, a name on the hub, or a synthetic part.

Knows names and files. Does not know what a part computes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mllm.config.model import check_parts

GGUF = ".gguf"
"""The suffix of a file that holds an LLM whole, with config and tokenizer."""
SYNTHETIC_PREFIX = "synthetic:"
RUN_PREFIX = "run:"
"""Before the name of a folder inside the run folder itself, which may be moved with it."""
SYNTHETIC_PARTS = ("llm", "vision", "audio", "lips")


def resolve_source(reference: str) -> str:
    """Return the folder of a `synthetic:` part, a local folder as it is, or the reference itself as a hub name.

    Raises:
        ValueError: a `synthetic:` part that does not exist.
    """
    if not reference.startswith(SYNTHETIC_PREFIX):
        return reference
    part = reference.removeprefix(SYNTHETIC_PREFIX)
    if part not in SYNTHETIC_PARTS:
        raise ValueError(f"{reference!r} is no synthetic part; allowed: {', '.join(SYNTHETIC_PARTS)}")
    return str(Path(__file__).parents[1] / "synthetic" / "assets" / part)


def inside_run(part: str, source: Mapping[str, str]) -> dict[str, str]:
    """Say of a part that it lies in the run's own folder, under its name."""
    return {"reference": f"{RUN_PREFIX}{part}", "sha256": source["sha256"]}


def is_part(path: str | Path) -> bool:
    """Tell whether a path is a folder, or a GGUF file, that a part can be read from."""
    return Path(path).is_dir() or (Path(path).suffix == GGUF and Path(path).is_file())


def folder_of(reference: str) -> dict[str, str]:
    """Note where a local folder is, so that a run finds it from another; nothing for a hub name or `synthetic:`."""
    is_local = not reference.startswith((SYNTHETIC_PREFIX, RUN_PREFIX)) and is_part(reference)
    return {"folder": os.path.abspath(reference)} if is_local else {}


def seen_from(sources: Mapping[str, Mapping[str, str]], run: str | Path) -> dict[str, dict[str, str]]:
    """Note where local folders are as seen from the run, so that both can be moved together."""
    start = os.path.abspath(run)
    return {
        part: {**source, "from_run": os.path.relpath(source["folder"], start)} if "folder" in source else dict(source)
        for part, source in sources.items()
    }


def identities(sources: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return what tells the parts of one run from those of another, wherever they are."""
    return {part: {key: source[key] for key in ("reference", "sha256")} for part, source in sources.items()}


def find_parts(
    sources: Mapping[str, Mapping[str, str]], run: str | Path, moved: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """Find the frozen parts of a run: where they were, or where they are as seen from the run or from here.

    Args:
        sources: `reference` and `sha256` by part, and where there is one the `folder` it was in and its path
            `from_run`.
        run: the folder of the run, wherever that is now.
        moved: by part, another folder to take it from, or hub name where it came from a hub.

    Returns:
        The sources with references that can be read from here.

    Raises:
        ValueError: a part in `moved` that the model has not.
        FileNotFoundError: a part that was in a folder and is in none now, with the option that names another; or that
            option names no folder.
    """
    check_parts(moved or {}, sources)
    here = {part: dict(source) for part, source in sources.items()}
    for part, source in here.items():
        source["reference"] = (moved or {}).get(part) or _find(part, source, Path(run))
        if part in (moved or {}) and source["sha256"] and not is_part(resolve_source(source["reference"])):
            raise _no_folder(part, source["reference"])
        source |= folder_of(source["reference"])
    return here


def _find(part: str, source: Mapping[str, str], run: Path) -> str:
    reference = source["reference"]
    if reference.startswith(RUN_PREFIX):
        reference = str(run / reference.removeprefix(RUN_PREFIX))
        if not Path(reference).is_dir():
            raise _gone(part, reference)
    # Only of a folder could a digest be taken: what has none is a name on the hub.
    if reference.startswith(SYNTHETIC_PREFIX) or not source["sha256"]:
        return reference
    candidates = [reference] if Path(reference).is_absolute() else []
    candidates += [source["folder"]] if "folder" in source else []
    candidates += [str(run / source["from_run"])] if "from_run" in source else []
    if not Path(reference).is_absolute():
        # Runs of before places were noted: a project that was moved as a whole has the part beside a parent.
        candidates += [reference, *(str(parent / reference) for parent in run.resolve().parents)]
    here = list(dict.fromkeys(os.path.abspath(folder) for folder in candidates if is_part(folder)))
    if not here:
        raise _gone(part, source.get("folder", reference))
    if len(here) == 1:
        return here[0]
    return next((folder for folder in here if digest_of(folder) == source["sha256"]), here[0])


def _gone(part: str, folder: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the folder {folder} is not there, from which {part} was taken; pass --sources.{part} with where it is now "
        f'(in Python sources={{"{part}": ...}})'
    )


def _no_folder(part: str, folder: str) -> FileNotFoundError:
    option = f'--sources.{part} (in Python sources={{"{part}": ...}})'
    return FileNotFoundError(
        f"the folder {folder} is not there, which {option} names; it must be a folder on this machine and no name on a "
        f"hub, since the SHA-256 of its weights is compared with that of the {part} this model was trained on"
    )


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


def gguf_file(source: str | Path) -> Path | None:
    """Return the GGUF file that a source is, or that a folder holds in place of safetensors; None where there is none.

    Raises:
        ValueError: a GGUF file that is not there, or a folder that holds several.
    """
    path = Path(source)
    if path.suffix == GGUF and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"the file {path} is not there")
        return path
    if not path.is_dir() or any((path / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return None
    files = sorted(path.glob(f"*{GGUF}"))
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0] if files else None


def weight_files(folder: str | Path) -> list[Path]:
    """List the safetensors files that hold the model of a local folder, or its GGUF file; none where it has no weights.

    Raises:
        ValueError: an index that names files which are not there, or as `gguf_file`.
    """
    if (gguf := gguf_file(folder)) is not None:
        return [gguf]
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
    facts = [(file, file.stat()) for file in files]
    return _digest_of_files(tuple((str(file), fact.st_size, fact.st_mtime_ns) for file, fact in facts))


@lru_cache(maxsize=64)
def _digest_of_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """Compute the digest of files of these sizes and times, once per process: a run needs it several times."""
    if not files:
        return ""
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(Path(path).name.encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
