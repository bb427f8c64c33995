"""Finds things in the folder of a run, finished or not: its model, its checkpoints, what belongs to both.

Knows names of files and folders. Does not know what is in them.

A finished run holds a model itself, and its newest checkpoints as `checkpoint-00000500`; one that was interrupted holds
checkpoints alone. The processor of all of them is the run's own.
"""

import re
from pathlib import Path

CONFIG = "config.json"
PROCESSOR = "processor_config.json"
RUN_CONFIG = "settings.yaml"
"""The run config with every default filled in, as a training run writes it."""
LOG = "log.jsonl"
"""One row per report of a run: `{"step": ..., "loss": ..., "loss/audio=/4": ..., ...}`."""
BEST = "best"
"""The folder of what was trained when the figure that `train.best_metric` names was best, a run folder itself."""
VALIDATION_ANSWERS = "validation_answers.jsonl"
"""What the model answered at the last validation, a row per sample and budget."""
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{8,})")
MODEL_ASIDE = ".model.writing"
"""Where a run's model is written before its files get their names: inside the run, which may be a disk of its own."""
NEWEST = "auto"
"""What is written for the newest checkpoint, wherever one is asked for."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in its run."""
    return run / f"checkpoint-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """List every folder of a run that is called a checkpoint, oldest first, complete or not."""
    folders = [path for path in run.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=_step)


def run_of(folder: str | Path) -> Path:
    """Return the run that a folder belongs to: the one around a checkpoint, or the folder itself."""
    folder = Path(folder)
    is_checkpoint = CHECKPOINT_NAME.fullmatch(folder.resolve().name) is not None
    return folder.resolve().parent if is_checkpoint else folder


def results_folder(model: str | Path, kind: str) -> Path:
    """Return where results of a model go: inside its folder, or beside it where that is a checkpoint of a run.

    A checkpoint goes when newer ones are kept, and what it answered is to stay.

    Args:
        model: a run, a checkpoint of one, or an exported model.
        kind: what the folder is called; of a checkpoint its name follows.
    """
    model = Path(model)
    run = run_of(model)
    return run / (kind if run == model else f"{kind}-{model.resolve().name}")


def model_folder(folder: str | Path, checkpoint: str | int | None = None) -> Path:
    """Find the folder that holds the model a user means.

    Args:
        folder: a run, a checkpoint of one, or an exported model.
        checkpoint: of a run: the step, the name of the folder, or `auto` for the newest.

    Raises:
        FileNotFoundError: there is none; what there is, is named.
    """
    folder = Path(folder)
    present = list_checkpoints(folder)
    if checkpoint is None:
        if (folder / CONFIG).is_file():
            return folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} holds no model: there is no such folder")
        more = f"; it holds {_names(present)}: give one as checkpoint" if present else ""
        raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG} in it{more}")
    wanted = str(checkpoint)
    if wanted == NEWEST:
        chosen = [path for path in reversed(present) if (path / CONFIG).is_file()]
    else:
        chosen = [path for path in present if wanted == path.name or (wanted.isdigit() and int(wanted) == _step(path))]
    if not chosen or not (chosen[0] / CONFIG).is_file():
        has = f"it holds {_names(present)}" if present else "it holds none"
        raise FileNotFoundError(f"checkpoint {wanted} is not in {folder}; {has} (a step, a name, or {NEWEST})")
    return chosen[0]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
