"""Uploads a run or an export to a model hub: chosen files, without this machine's paths, with a model card.

Knows which files of a folder make a model. The client of the hub is huggingface_hub's.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mllm.evaluation.model_card import CARD, PLOT_IN_CARD, card_of, plot_of
from mllm.utils.run_paths import CONFIG

UPLOADED = (
    *("config.json", "generation_config.json", "trainables.safetensors"),
    *("model*.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("adapter/*", "adapters/*/*", "experts.json", "experts/*/*", CARD),
)
"""What makes a model; checkpoints, logs, data, answers and settings, which name files of this machine, are not."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Hold tokens, of which `/` and `/usr` may be some, and no path."""


def files_to_upload(folder: Path) -> list[str]:
    """List the files of a run or an export that make the model, as paths inside the folder.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG} in it")
    inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    # A pattern's * would also match what lies deeper, such as the tokenizer of a checkpoint inside.
    return sorted(
        path for path in inside if any(fnmatch(path, p) and path.count("/") == p.count("/") for p in UPLOADED)
    )


def stage(folder: Path, staging: Path, *, repo: str, licence: str | None = None) -> list[str]:
    """Lay out what is uploaded: the files of the model, with paths of this machine taken out, and a card.

    The card of an export, which `mllm export` wrote from its run, is kept; that of a run is written anew.

    Args:
        staging: an empty folder; large files become links in it.

    Returns:
        The files, as paths inside it.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    for path in files_to_upload(folder):
        target = staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".json") and path not in VOCABULARIES:
            values = json.loads((folder / path).read_text(encoding="utf-8"))
            target.write_text(json.dumps(_without_paths(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            target.symlink_to((folder / path).resolve())
    is_run = (folder / "trainables.safetensors").is_file()
    if is_run or not (folder / CARD).is_file():
        (staging / CARD).unlink(missing_ok=True)
        text = card_of(folder, repo=repo, licence=licence, is_export=not is_run)
        (staging / CARD).write_text(text, encoding="utf-8")
    for plot in (folder / PLOT_IN_CARD, plot_of(folder)):
        if plot is not None and plot.is_file():
            shutil.copyfile(plot, staging / PLOT_IN_CARD)
    return sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())


def push_to_hub(
    folder: str | Path, repo: str, *, private: bool = True, licence: str | None = None, token: str | None = None
) -> str:
    """Upload a run or an export with its card, as one commit.

    Args:
        repo: OWNER/NAME; made where it is not there.
        private: of a repository that is made.
        licence: of the result, such as apache-2.0, for the card.
        token: of the hub; the one that `hf auth login` or HF_TOKEN has set when None.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: a name that is none.
        OSError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    if repo.count("/") != 1:
        raise ValueError(f"repo is {repo!r}; write OWNER/NAME")
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as staging:
        stage(folder, Path(staging), repo=repo, licence=licence)
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=staging, commit_message=f"Upload {folder.resolve().name} with mllm"
        )
    return str(commit.commit_url)


def write_card(run: Path, export: Path) -> None:
    """Write the card of a run, and its plot, into an export of it."""
    (export / CARD).write_text(card_of(run, is_export=True), encoding="utf-8")
    if (plot := plot_of(run)) is not None:
        shutil.copyfile(plot, export / PLOT_IN_CARD)


def _without_paths(values: Any) -> Any:
    """Cut paths that exist on this machine down to their last part; they help nobody else, and tell of its owner."""
    if isinstance(values, Mapping):
        kept = {key: value for key, value in values.items() if key not in ("folder", "from_run")}
        return {key: _without_paths(value) for key, value in kept.items()}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    if isinstance(values, str) and os.path.isabs(values) and os.path.exists(values):
        return os.path.basename(os.path.normpath(values))
    return values
