"""Stops a run at the end of a step on a signal, the same step on every process, and says how to go on.

Knows signals, transformers' callbacks and the files of a run. Does not know models or data.

    the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP, on any process ── the step is finished and saved, exit status 128 + n
    a second one, a second or more later                         ── the process ends at once; checkpoints stay whole
    before the first step                                        ── the process ends, and nothing was there to save

A signal reaches one process or several, at different steps. So what is requested travels with the counts of target
tokens that all processes exchange before each step anyway (`ElasticTrainer`), and all of them stop at the same one.
"""

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.utils.run_paths import list_checkpoints

STOPPING = tuple(
    number for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
"""What schedulers, terminals and people end a run with, or announce its end with."""
SECONDS_OF_ONE_REQUEST = 1.0
"""A launcher hands on what a terminal has sent to its processes already: within this time both are one request."""

logger = logging.getLogger(__name__)


class RunInterrupted(KeyboardInterrupt):
    """Says that a signal ended a run, behind a saved step or before there was one.

    Args:
        number: of the signal.
        is_agreed: whether all processes end this way, and not this one alone.
    """

    def __init__(self, number: int, *, is_agreed: bool = False) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.is_agreed = is_agreed

    @property
    def exit_status(self) -> int:
        """What shells give a process that a signal ended: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class StopRequest:
    """Keeps what was requested by a signal on this process, and what all processes have agreed on."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that this process got; 0 for none."""
        self.agreed_number = 0
        """Of one that any process got, known to all of them at the same step."""
        self.is_training = False
        self._requested_at = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first, end at the second.

        Raises:
            RunInterrupted: the training has not begun, so there is no step to finish.
        """
        if not self.number:
            self.number, self._requested_at = number, time.monotonic()
            if not self.is_training:
                raise RunInterrupted(number)
            logger.warning(
                "%s: this step is finished and saved first; send it again to end at once", signal.Signals(number).name
            )
        elif time.monotonic() - self._requested_at >= SECONDS_OF_ONE_REQUEST:
            # No unwinding, which might wait for a stuck worker or another process: checkpoints are whole at any time.
            sys.stderr.write(f"{signal.Signals(number).name} again: ending at once\n")
            sys.stderr.flush()
            os._exit(128 + number)


@contextmanager
def stopping_on_signals(request: StopRequest) -> Iterator[None]:
    """Hand signals to a request inside the block; only the main thread may, and on another nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What the parent has told this process to ignore, as nohup does with SIGHUP, stays ignored.
    heeded = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, request.receive) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnRequest(TrainerCallback):
    """Ends the training after the step in which that was agreed on, with a checkpoint of that step."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if args.world_size == 1:  # nobody to agree with
            self.request.agreed_number = self.request.number
        if self.request.agreed_number:
            control.should_log = control.should_save = control.should_training_stop = True
        return control


class SaveOnTime(TrainerCallback):
    """Saves a checkpoint at the end of the step in which that was agreed on, and counts the minutes since the last.

    Args:
        minutes: the longest time between two checkpoints, by the clock of the first process; None never saves.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.is_agreed = False
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Tell whether the time since the last checkpoint is over."""
        return self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save = control.should_save or self.is_agreed
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()


def how_to_go_on(run: Path, config_file: Path, why: str = "interrupted") -> str:
    """Say what a run that was interrupted has saved, and the line that goes on from there.

    Args:
        config_file: the config in the run folder.
        why: what ended the run.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return f"{why}; {run} holds no checkpoint yet, so nothing is lost by starting anew"
    line = f"mllm train --config {shlex.quote(str(config_file))} --resume auto"
    return f"{why}; saved: {checkpoints[-1]}\ngo on with: {line}"
