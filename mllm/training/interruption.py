"""Stops a run at the end of a step when its user interrupts it, and says what was saved and how to go on.

Knows signals, transformers' callbacks and the files of a run. Does not know models or data.
"""

import logging
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.utils.run_paths import list_checkpoints

logger = logging.getLogger(__name__)


class StopOnRequest(TrainerCallback):
    """Ends the training after the step in which that is requested, with a checkpoint of that step."""

    def __init__(self) -> None:
        self.is_requested = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.is_requested:
            control.should_log = control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stopping_on_interrupt(callback: StopOnRequest, *, num_processes: int) -> Iterator[None]:
    """Let the first SIGINT ask a callback to stop the training, and a second one interrupt at once.

    With several processes it is left as it is: they are interrupted at different steps, and one that saved alone would
    wait for the others for ever.
    """
    if num_processes > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if callback.is_requested:
            raise KeyboardInterrupt
        callback.is_requested = True
        logger.warning("interrupted: this step is finished and saved first; interrupt again to stop at once")

    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ignore_interrupts(worker: int) -> None:
    """Leave it to the training process what an interrupt means; a terminal sends it to the workers as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def how_to_go_on(run: Path, config_file: Path) -> str:
    """Say what a run that was interrupted has saved, and the line that goes on from there.

    Args:
        config_file: the config in the run folder.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return f"interrupted; {run} holds no checkpoint yet, so nothing is lost by starting anew"
    line = f"mllm train --config {shlex.quote(str(config_file))} --resume auto"
    return f"interrupted; saved: {checkpoints[-1]}\ngo on with: {line}"
