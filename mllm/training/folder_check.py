"""Checks every byte of a run folder, of one checkpoint or of an export, and lists what is missing or damaged.

Knows manifests, the files of a run and where its frozen parts come from. Does not know what is in a file.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from mllm.checkpoints.sources import digest_of, find_parts, resolve_source
from mllm.training.run_folder import read_checkpoint
from mllm.utils.run_paths import BEST, CHECKPOINT_NAME, CONFIG, list_checkpoints, run_of
from mllm.utils.sealing import MANIFEST, find_problems, read_manifest


@dataclass
class CheckedFolder:
    """Holds what a check gave: lines about what is whole, and lines about what is not."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_folder(folder: Path) -> CheckedFolder:
    """Compare the files of a folder with the digests that were written with them, and its frozen parts as well.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds neither a model nor a checkpoint.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    checked, checkpoints = CheckedFolder(), list_checkpoints(folder)
    if CHECKPOINT_NAME.fullmatch(folder.name):
        checkpoints = [folder]
    elif (folder / MANIFEST).exists():
        _check_sealed(checked, folder)
    elif (folder / CONFIG).exists():
        checked.problems.append(
            f"{folder} has no {MANIFEST}: it was written elsewhere or before there were digests, so nothing of its "
            "model can be checked; `mllm export`, or the end of a training, writes one"
        )
    elif not checkpoints:
        raise ValueError(f"{folder} holds no model and no checkpoint: there is neither {MANIFEST} nor {CONFIG} in it")
    for checkpoint in checkpoints:
        _check_checkpoint(checked, checkpoint)
    if (folder / BEST).is_dir():
        _check_sealed(checked, folder / BEST)
    newest = next((home for home in (folder, *reversed(checkpoints)) if (home / CONFIG).is_file()), None)
    if newest is not None:
        _check_parts(checked, newest)
    return checked


def _check_sealed(checked: CheckedFolder, folder: Path) -> None:
    problems = find_problems(folder)
    checked.problems.extend(problems)
    if not problems:
        files = read_manifest(folder)["files"]
        checked.facts.append(f"{folder} is whole: {len(files)} files, {_total(files):,} bytes")


def _check_checkpoint(checked: CheckedFolder, folder: Path) -> None:
    try:
        checkpoint = read_checkpoint(folder)
    except ValueError as error:
        # The first problem tells that it is none; the manifest, where that is whole, tells of all.
        checked.problems.extend(find_problems(folder) or [str(error)])
        return
    files = read_manifest(folder)["files"]
    checked.facts.append(f"{folder} is whole: step {checkpoint.step}, {len(files)} files, {_total(files):,} bytes")


def _check_parts(checked: CheckedFolder, folder: Path) -> None:
    """Compare the weights of frozen parts in local folders with those the model was trained on."""
    try:
        sources = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("sources") or {}
        parts = find_parts(sources, run_of(folder))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        checked.problems.append(f"the frozen parts of {folder} cannot be found: {error}")
        return
    for part, source in parts.items():
        if not source["sha256"]:
            checked.facts.append(f"{part} in {source['reference']} has no digest: it came from a hub by its name")
        elif digest_of(resolve_source(source["reference"])) == source["sha256"]:
            checked.facts.append(f"{part} in {source['reference']} is what the model was trained on")
        else:
            checked.problems.append(f"{part} in {source['reference']} is not what the model was trained on")


def _total(files: dict[str, dict[str, int]]) -> int:
    return sum(sealed["bytes"] for sealed in files.values())
