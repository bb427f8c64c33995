"""Reports what a run does: loss per budget, tokens per second, to a file, tensorboard and a progress bar.

Knows numbers by name. Does not know how they come about.

`log.jsonl` in the run folder has one row per report, `{"step": ..., "loss": ..., "loss/audio=/4": ..., ...}`.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.training.step import TrainingBatch
from mllm.training.throughput import bottleneck
from mllm.utils.distributed import gather_json
from mllm.utils.files import append_text, write_text_whole
from mllm.utils.json_text import json_text
from mllm.utils.run_paths import LOG

logger = logging.getLogger(__name__)


class Tally:
    """Adds up losses and tokens since the last report. Losses stay on the device until they are reported."""

    def __init__(self) -> None:
        self.budget_losses: list[tuple[Sequence[str], Tensor]] = []
        self.num_soft_tokens = 0
        self.num_tokens = 0
        self.target_counts: dict[str, int] = {}
        self.auxiliary: dict[str, list[tuple[Sequence[str], Tensor]]] = {}
        self.started = time.monotonic()

    def add(
        self, training_batch: TrainingBatch, budget_losses: Tensor, auxiliary: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add one training batch with its loss summed per budget (K,), and its auxiliary losses, see `Loss`."""
        self.budget_losses.append((training_batch.names, budget_losses))
        for kind, losses in (auxiliary or {}).items():
            self.auxiliary.setdefault(kind, []).append((training_batch.names, losses))
        for name, count in zip(training_batch.names, training_batch.target_counts, strict=True):
            self.target_counts[name] = self.target_counts.get(name, 0) + count
        self.num_soft_tokens += training_batch.num_soft_tokens
        self.num_tokens += training_batch.num_tokens

    def losses(self) -> dict[str, float]:
        """Average the loss per target token by budget over all processes; a collective."""
        sums_and_counts = {name: [0.0, float(count)] for name, count in self.target_counts.items()}
        for names, budget_losses in self.budget_losses:
            for name, value in zip(names, budget_losses.tolist(), strict=True):
                sums_and_counts[name][0] += value
        return _means(sums_and_counts)

    def auxiliary_losses(self) -> dict[str, float]:
        """Average each auxiliary loss over the views that have one, by budget, over all processes; a collective."""
        sums_and_counts: dict[str, list[float]] = {}
        for kind, reports in self.auxiliary.items():
            for names, losses in reports:
                for name, value, count in zip(names, *losses.tolist(), strict=True):
                    entry = sums_and_counts.setdefault(f"{kind}/{name}", [0.0, 0.0])
                    entry[0] += value
                    entry[1] += count
        return _means(sums_and_counts)

    def report(self, steps: int) -> dict[str, float]:
        """Report losses, and what `steps` steps cost, over all processes; a collective."""
        logs = {f"loss/{name}": value for name, value in self.losses().items()}
        logs |= self.auxiliary_losses()
        costs = gather_json([self.num_tokens, self.num_soft_tokens])
        logs["tokens_per_second"] = sum(tokens for tokens, _ in costs) / max(time.monotonic() - self.started, 1e-9)
        logs["soft_tokens_per_step"] = sum(soft for _, soft in costs) / max(steps, 1)
        return logs


def _means(sums_and_counts: dict[str, list[float]]) -> dict[str, float]:
    """Divide sum by count of every name, over all processes."""
    total: dict[str, list[float]] = {}
    for part in gather_json(sums_and_counts):
        for name, (value, count) in part.items():
            entry = total.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += count
    return {name: value / count for name, (value, count) in sorted(total.items()) if count}


class RunLog(TrainerCallback):
    """Writes every report to `log.jsonl` and, where it is installed, to tensorboard; only on the main process. At the
    end it says where the time went.

    A resumed run first drops the rows beyond the step it resumes from, so that every step stands there once.
    """

    def __init__(self, run: Path, *, tensorboard: bool, num_workers: int = 0) -> None:
        self.run = run
        self.tensorboard = tensorboard
        self.num_workers = num_workers
        self.paces: list[dict[str, float]] = []
        self.reported_step = 0
        self.writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.reported_step = state.global_step
            _drop_rows_after(self.run / LOG, state.global_step)
            self.writer = _tensorboard_writer(self.run, state.global_step) if self.tensorboard else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "seconds/waiting" in logs:
            self.paces.append({**logs, "steps": state.global_step - self.reported_step})
            self.reported_step = state.global_step
        if "eval_loss" in logs:
            logger.info("%s", validation_line(state.global_step, logs))
        append_text(self.run / LOG, json_text({"step": state.global_step, **logs}) + "\n")
        if self.writer is not None:
            for name, value in logs.items():
                self.writer.add_scalar(name, value, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if line := bottleneck(self.paces, self.num_workers):
            logger.info("%s", line)
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class RunFlow(TrainerCallback):
    """Reports at every checkpoint, so that no report spans one, and validates once more after the last step."""

    def __init__(self, *, validates: bool) -> None:
        self.validates = validates

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        if self.validates and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class RunProgress(ProgressCallback):
    """Shows transformers' progress bar with the loss beside it, instead of every report above it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{(logs or {})['loss']:.4f}")


def validation_line(step: int, metrics: Mapping[str, float]) -> str:
    """Write a validation as people read it: each figure, and behind it that of every budget.

    Args:
        metrics: of `ElasticTrainer.evaluate`: `eval_loss`, `eval_loss/audio=/4`, `eval_wer/asr/audio=/4`, ...
    """
    by_figure: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if name.startswith("eval_"):
            figure, _, of = name.removeprefix("eval_").partition("/")
            by_figure.setdefault(figure, []).insert(
                0 if not of else len(by_figure[figure]), f"{of} {value:.4g}".strip()
            )
    words = [
        f"{figure} {values[0]}" + (f" ({', '.join(values[1:])})" if len(values) > 1 else "")
        for figure, values in by_figure.items()
    ]
    return f"validation after step {step}: {'; '.join(words)}"


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if 0 <= _step_of(line) <= step]
    write_text_whole(path, "".join(f"{line}\n" for line in rows))


def _step_of(line: str) -> int:
    """Read the step of a row; -1 for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return -1


def _tensorboard_writer(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed, so only %s is written", LOG)
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
