"""What each of two processes does in the NaN cases of `test_two_processes.py`; started by a launcher.

python nan_worker.py FOLDER NUMBER_OF_CASES [--deepspeed CONFIG]

In every case a gradient of the second process alone becomes infinite, or no number, at one step.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import tiny
from accelerate import PartialState
from harness import make_trainer, run_settings
from torch import Tensor
from transformers import TrainerCallback

from mllm.training.run_folder import list_checkpoints, read_checkpoint
from mllm.utils.distributed import finish_launch, prepare_launch

STEPS = 3
VALUES = ("nan", "inf")
PLACES = ("compressors", "lora_B")


class Poison(TrainerCallback):
    """Spoils the gradient of one parameter at one step of the second process."""

    def __init__(self, place: str, value: str, step: int) -> None:
        self.place, self.value, self.step, self.now = place, float(value), step, 0

    def watch(self, model: Any) -> "Poison":
        """Hook the first parameter of the place."""
        parameter = next(p for name, p in model.named_parameters() if self.place in name and p.requires_grad)
        parameter.register_hook(self._spoil)
        return self

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step + 1

    def _spoil(self, gradient: Tensor) -> Tensor:
        is_here = PartialState().process_index == 1 and self.now == self.step
        return gradient * self.value if is_here else gradient


def stopped_at(folder: Path, place: str, value: str, step: int, deepspeed: str | None) -> dict[str, Any]:
    """Train until it is stopped; what stopped it, where the trainer stood, and what was saved."""
    settings = run_settings(
        folder / f"{place}-{value}-{step}",
        tiny.settings(("audio",)),
        save_every=1,
        keep_checkpoints=9,
        deepspeed=deepspeed,
    )
    trainer = make_trainer(settings, kinds=[("audio",)], rows=8)
    trainer.add_callback(Poison(place, value, step).watch(trainer.elastic))
    try:
        trainer.train()
        message = "trained on"
    except FloatingPointError as error:
        message = str(error)
    saved = [read_checkpoint(checkpoint).step for checkpoint in list_checkpoints(Path(settings.train.out))]
    return {"case": [place, value, step], "message": message, "at": trainer.state.global_step, "saved": saved}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_cases", type=int)
    parser.add_argument("--deepspeed")
    options = parser.parse_args()
    prepare_launch(use_cpu=True, deepspeed=options.deepspeed is not None)
    cases = [(place, value, step) for place in PLACES for value in VALUES for step in (STEPS, 1)]
    told = [stopped_at(options.folder, *case, options.deepspeed) for case in cases[: options.num_cases]]
    (options.folder / f"told-{PartialState().process_index}.json").write_text(json.dumps(told))
    finish_launch(0)


if __name__ == "__main__":
    main()
