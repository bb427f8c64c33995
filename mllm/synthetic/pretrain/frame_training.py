"""Trains an encoder to name the phone of each frame, for the synthetic audio and the synthetic lip encoder.

Knows an encoder, the phone of every frame, and how to log a run. Does not know how frames are made from audio or video.

Shapes: N clips, T frames of the longest clip, D feature size, P phones.
The loss is the cross-entropy of each frame's phone against the synthesiser's own timing; frames beyond a clip's end
carry the label `IGNORED` and count nowhere.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm.checkpoints.tensor_files import write_model, write_tensors
from mllm.synthetic.speech.phones import PHONE_IDS, PHONES
from mllm.synthetic.speech.synthesis import Phone

logger = logging.getLogger(__name__)
IGNORED = -100
PHONE_HEAD_FILE = "phone_head.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Say how long and how fast: AdamW with a linear warm-up and a cosine to zero."""

    steps: int
    seed: int
    batch_clips: int = 24
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    log_every_steps: int = 50
    validate_every_steps: int = 200


@dataclass(frozen=True)
class FrameBatch:
    """Hold `inputs`, what the encoder takes by name, and labels (N, T) int64."""

    inputs: dict[str, Tensor]
    labels: Tensor


class PhoneClassifier(nn.Module):
    """Puts a linear layer on an encoder that names the phone of each frame; it is shipped for measuring only."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(PHONES))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute scores (N, T, P)."""
        features = self.encoder(**inputs)
        return self.head(features if isinstance(features, Tensor) else features.last_hidden_state)


class RunLog:
    """Writes one JSON object per line: what the run was, its losses, its accuracies, and seconds since its start."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._start_seconds = time.monotonic()
        path.write_text("")

    def write(self, **facts: Any) -> None:
        row = {**facts, "seconds": round(time.monotonic() - self._start_seconds, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s", row)


def frame_phones(phones: Sequence[Phone], num_frames: int, *, frames_per_second: float, centre: float) -> np.ndarray:
    """Look up the phone class of every frame, (T,) int64: of frame i, the phone spoken at (i + centre) /
    frames_per_second."""
    ends = np.array([end for _, _, end in phones])
    times = (np.arange(num_frames) + centre) / frames_per_second
    spoken = np.minimum(np.searchsorted(ends, times, side="right"), len(phones) - 1)
    return np.array([PHONE_IDS[symbol] for symbol, _, _ in phones])[spoken]


def train_frames(
    model: PhoneClassifier,
    sample_batch: Callable[[np.random.Generator], FrameBatch],
    validate: Callable[[], dict[str, float]],
    *,
    recipe: Recipe,
    log: RunLog,
) -> None:
    """Train in place; the batch of step i is sampled by a generator made of (seed, i)."""
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, recipe))
    log.write(event="start", recipe=asdict(recipe), versions=_versions(), parameters=_count(model.encoder))
    losses: list[Tensor] = []
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = sample_batch(np.random.default_rng([recipe.seed, step]))
        scores = model(batch.inputs)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % recipe.log_every_steps == 0 or step == recipe.steps:
            log.write(event="train", step=step, loss=round(float(torch.stack(losses).mean()), 4))
            losses.clear()
        if step % recipe.validate_every_steps == 0 and step != recipe.steps:
            log.write(event="validation", step=step, **validate())
            model.train()


def train_and_measure(
    model: PhoneClassifier,
    sample_batch: Callable[[np.random.Generator], FrameBatch],
    held_out: Callable[[str], Mapping[str, Sequence[FrameBatch]]],
    folder: Path,
    *,
    recipe: Recipe,
    log: RunLog,
) -> dict[str, float]:
    """Train, measure on the validation split and, once, on the test split, and write the encoder.

    Args:
        held_out: the batches of a split that is not trained on, by the name of what they measure.

    Returns:
        frame accuracy in percent on the test split, by name.
    """
    validation = held_out("validation")
    train_frames(model, sample_batch, lambda: frame_accuracies(model, validation), recipe=recipe, log=log)
    log.write(event="validation", step=recipe.steps, **frame_accuracies(model, validation))
    result = frame_accuracies(model, held_out("test"))
    log.write(event="test", weights_bytes=save_encoder(model, folder), **result)
    return result


def frame_accuracies(model: PhoneClassifier, batches: Mapping[str, Sequence[FrameBatch]]) -> dict[str, float]:
    """Compute `frame_accuracy` by name."""
    return {name: frame_accuracy(model, held_out) for name, held_out in batches.items()}


@torch.no_grad()
def frame_accuracy(model: PhoneClassifier, batches: Sequence[FrameBatch]) -> float:
    """Compute the percent of spoken frames (silence is left out) whose phone the model names."""
    model.eval()
    right = total = 0
    for batch in batches:
        is_spoken = (batch.labels != IGNORED) & (batch.labels != 0)
        guess = model(batch.inputs).argmax(dim=-1)
        right += int((guess == batch.labels)[is_spoken].sum())
        total += int(is_spoken.sum())
    return round(100 * right / total, 2)


def save_encoder(model: PhoneClassifier, folder: Path) -> int:
    """Write config, half-precision weights and the phone layer; returns the bytes of the weights.

    The config says float32: that is what the weights are to be loaded as, also on machines that are slow at half.
    """
    encoder = model.encoder.half()
    write_model(encoder, folder)
    head = {name: value.detach().to(torch.float16).contiguous() for name, value in model.head.state_dict().items()}
    write_tensors(head, folder / PHONE_HEAD_FILE)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text()) | {"dtype": "float32"}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return (folder / "model.safetensors").stat().st_size


def _rate_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
