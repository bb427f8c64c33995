"""Makes a process fail at a named place, so that tests can ask what is left of its work.

    MLLM_FAIL_POINT=checkpoint.sealed:kill@2     the second time it comes there, it is killed

Without the variable a place costs one comparison. Knows names and ways to fail; a place knows only its name.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

VARIABLE = "MLLM_FAIL_POINT"
FAIL_POINTS = {
    "checkpoint.written": "the files of a checkpoint are written, its manifest is not",
    "checkpoint.sealed": "a checkpoint is whole and has no name yet",
    "checkpoint.named": "a checkpoint has its name, and older ones are still there",
    "checkpoint.deleting": "an older checkpoint has lost its name and is still there",
    "model.written": "the model of a run is written aside",
    "weights.file": "a file of a model's weights is written, and its config is not",
    "model.moving": "a file of a run's model takes its name",
    "load.checkpoint": "a checkpoint was chosen, and is put into model and optimizer",
    "step.begin": "a micro-batch begins",
    "step.end": "a micro-batch has its gradients",
    "collate": "a batch is made of loaded samples",
    "decode": "the media of a sample are decoded",
    "evaluate.answered": "answers are there, and not on the disk",
    "evaluate.kept": "answers are on the disk",
    "features.shard": "a shard of features is written, and no index knows of it",
    "features.index": "the index knows of a shard",
    "prepare.clip": "a clip is prepared, and no report knows of it",
    "serve.prepare": "a request is read, and its media and prompt are prepared",
    "serve.answer": "the LLM is about to go on with the answers of some requests",
}
"""Every place, and how far a process has come there."""
ACTIONS = ("kill", "raise", "full", "hang", "term")
"""What happens: kill -9, an error that nobody expects, a full disk, nothing for ever, SIGTERM."""


@dataclass
class Armed:
    """Says which place fails, how, and after how many times it was passed."""

    name: str
    action: str
    times_left: int


class InjectedError(RuntimeError):
    """Is what the action `raise` raises."""


def arm(text: str) -> None:
    """Let one place of this process fail, and of those that are forked from it; an empty text lets none.

    Args:
        text: NAME:ACTION or NAME:ACTION@N for the Nth time.

    Raises:
        ValueError: a name or an action that there is not.
    """
    global _armed
    if not text:
        _armed = None
        return
    name, _, action = text.partition(":")
    action, _, count = action.partition("@")
    if name not in FAIL_POINTS or action not in ACTIONS or not (count or "1").isdigit():
        raise ValueError(
            f"{VARIABLE} is {text!r}; it must be NAME:ACTION@N with one of the names {', '.join(FAIL_POINTS)} and one "
            f"of the actions {', '.join(ACTIONS)}"
        )
    _armed = Armed(name, action, int(count or 1))


def fail_point(name: str) -> None:
    """Fail here if this place is armed."""
    if _armed is not None and _armed.name == name:
        _fail(_armed)


def _fail(armed: Armed) -> None:
    armed.times_left -= 1
    if armed.times_left:
        return
    if armed.action == "raise":
        raise InjectedError(f"injected at {armed.name}")
    if armed.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if armed.action == "hang":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL if armed.action == "kill" else signal.SIGTERM)


_armed: Armed | None = None
arm(os.environ.get(VARIABLE, ""))
