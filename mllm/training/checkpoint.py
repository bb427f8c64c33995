"""Writes and reads training checkpoints, and chooses which one a run resumes from.

Knows tensors by name, plain state, and the files they go to. Does not know the trainer, DeepSpeed or the model.

    trainables.safetensors   exactly what trains, float32
    optimizer.safetensors    AdamW's moments and step count of each of them
    training.json            learning rates and the state of the schedule
    trainer_state.json       transformers' step, log history and so on
    config.json              the model's config, with the references and digests of its frozen parts
    manifest.json            sizes and digests of all of these, and the facts of the run (`run_folder.py`)

Nothing here is a pickle and none is ever read. There is no state of random generators: every random number is a
function of the seed and of what it is for (`trainer.py`, `mllm.utils.random_generator`).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mllm.checkpoints.load import TRAINABLES, save_trainables
from mllm.checkpoints.tensor_files import num_bytes_of, write_tensors
from mllm.config.run import differences
from mllm.training.run_folder import Checkpoint, delete_old, newest_checkpoint, read_checkpoint, write_checkpoint
from mllm.utils.json_text import json_text
from mllm.utils.run_paths import CONFIG, NEWEST, list_checkpoints

OPTIMIZER = "optimizer.safetensors"
TRAINING = "training.json"
TRAINER_STATE = "trainer_state.json"  # the name transformers looks for

# What may change between a run and its continuation: nothing that decides what a step learns from, or how.
_FREE = {
    "train": {
        *("tensorboard", "report_to", "progress", "use_cpu", "deepspeed", "gradient_checkpointing"),
        *("answered_samples", "answer_tokens", "best_metric", "best_is", "early_stopping"),
        *("out", "max_steps", "epochs", "log_every", "save_every", "save_minutes", "keep_checkpoints"),
        *("validate_every", "watchdog_minutes"),
        "loss_kernel",  # the same loss and gradients up to rounding
        "accumulation",  # checked together with the number of processes
    },
    "data": {"validation", "num_workers", "max_bad_fraction", "max_unsupervised_fraction", "video_backend", "limits"},
}
_FREE_KEYS = {"data.stream.shards_ahead", "data.stream.max_disk_gb"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Holds everything that goes into a checkpoint, whole and on the CPU.

    Args:
        trainables: what trains, by name.
        moments: the optimizer's state, as `optimization.moments_of` names it.
        plain: `{"learning_rates": [...], "schedule": {...}}`.
        trainer_state, config: JSON texts.
    """

    trainables: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    trainer_state: str
    config: str


def save_checkpoint(run: Path, step: int, state: TrainingState, *, facts: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Raises:
        ValueError: an empty tensor, by name.
        WriteError: see `run_folder.write_checkpoint`; older checkpoints are untouched.
    """

    def write(folder: Path) -> None:
        save_trainables(state.trainables, folder / TRAINABLES)
        write_tensors(state.moments, folder / OPTIMIZER)
        (folder / TRAINING).write_text(json_text(state.plain, indent=1), encoding="utf-8")
        (folder / TRAINER_STATE).write_text(state.trainer_state, encoding="utf-8")
        (folder / CONFIG).write_text(state.config, encoding="utf-8")

    num_bytes = num_bytes_of([*state.trainables.values(), *state.moments.values()])
    folder = write_checkpoint(run, step, write, facts, num_bytes=num_bytes)
    delete_old(run, keep)
    return folder


def load_progress(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load moments and plain state of a checkpoint that `read_checkpoint` has found whole."""
    return load_file(folder / OPTIMIZER), json.loads((folder / TRAINING).read_text(encoding="utf-8"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name."""
    return load_file(path)


def choose_checkpoint(run: Path, resume: str | None) -> Checkpoint | None:
    """Choose the checkpoint a run starts from, or None for a fresh start.

    Args:
        resume: None, `auto` for the newest complete one (a fresh start where there is none), or its folder.

    Raises:
        ValueError: a fresh start where there are checkpoints, none of them complete, a folder that is not a complete
            checkpoint of this run, or one that is older than another complete one.
    """
    present = list_checkpoints(run)
    if resume is None:
        if present:
            raise ValueError(
                f"{run} already holds {present[-1].name}; go on from it with --resume {NEWEST}, "
                "or give another train.out"
            )
        return None
    if resume == NEWEST:
        newest = newest_checkpoint(run)
        if newest is None and present:
            raise ValueError(f"none of the {len(present)} checkpoints in {run} is complete; see the log for reasons")
        return newest
    chosen = read_checkpoint(Path(resume))
    if chosen.folder.resolve().parent != run.resolve():
        raise ValueError(f"resume is {resume}, which is not in train.out {run}")
    newest = newest_checkpoint(run)
    if newest is not None and newest.step > chosen.step:
        raise ValueError(f"{newest.folder} is newer than {chosen.folder}; delete it to go back, or resume from it")
    return chosen


def set_aside_refused(run: Path, chosen: Checkpoint | None) -> None:
    """Rename what is newer than the chosen checkpoint, all of it refused, so that it is never counted as one."""
    for folder in list_checkpoints(run):
        if chosen is not None and int(folder.name.rpartition("-")[2]) > chosen.step:
            target = folder.with_name(f"{folder.name}.refused")
            logger.warning("setting %s aside as %s", folder, target.name)
            folder.rename(target)


def _is_same(before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return bool(now.get("sha256")) and before.get("sha256") == now["sha256"]


def check_continues(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run as another one.

    Args:
        before, now: facts of the run that wrote the checkpoint and of this one: `settings`, `processes`, `sources`,
            and of a stream `shards`.

    Raises:
        ValueError: a key that decides what a step learns has changed, or a frozen part has; every key is named.
    """
    # The same weights at another place are the same parts.
    same = [part for part, source in now["sources"].items() if _is_same(before["sources"].get(part, {}), source)]
    moved = {f"model.{part}" if part in ("llm", "host") else f"model.{part}.encoder.source" for part in same}
    changed = [
        line
        for line in differences(dict(before["settings"]), dict(now["settings"]))
        if line.split(" ", 1)[0].split(".")[1] not in _FREE.get(line.split(".", 1)[0], ())
        and line.split(" ", 1)[0] not in moved | _FREE_KEYS
    ]
    micro_batches = [facts["processes"] * facts["settings"]["train"]["accumulation"] for facts in (before, now)]
    if micro_batches[0] != micro_batches[1]:
        changed.append(
            f"processes x train.accumulation was {micro_batches[0]} and is {micro_batches[1]} micro-batches per step"
        )
    old, new = (
        {part: source for part, source in facts["sources"].items() if part not in same} for facts in (before, now)
    )
    changed += [f"frozen part {line}" for line in differences(old, new)]
    if before.get("shards") != now.get("shards"):
        changed.append("the shards of data.train are others, or of other sizes")
    if changed:
        raise ValueError(f"this is not the run the checkpoint belongs to: {'; '.join(changed)}")
    for key in ("max_steps", "epochs"):
        old, new = before["settings"]["train"][key], now["settings"]["train"][key]
        if old != new:
            logger.warning("train.%s was %s and is %s: the schedule goes on as that of the longer run", key, old, new)
