"""Pre-trains the small synthetic vision encoder on dense labels: what stands in every patch of a scene.

Knows scenes, a CLIP vision model and its labels. Does not know questions, the LLM or budgets.
Run once; the result is shipped in `assets/vision` and stays frozen. Features are the patch tokens of the last layer.

Besides the classes of every patch the encoder predicts the patch's bag of words (`blurred_text.scene_bags`) by a linear
map. Being linear, it also holds for means of patches: pooled features say what pooled bags say.

Shapes: B images, 64 patches each, D feature size, K scene words.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mllm.synthetic.images.questions import COLUMN_WORDS, ROW_WORDS
from mllm.synthetic.images.scenes import (
    CELL_PIXELS,
    COLOURS,
    GRID_CELLS,
    IMAGE_PIXELS,
    LETTERS,
    SHAPES,
    Scene,
    random_scenes,
    render_scene,
)
from mllm.synthetic.pretrain.blurred_text import SCENE_WORDS, scene_bags
from mllm.synthetic.pretrain.files import header, save_half, write_line
from mllm.synthetic.speech.phones import PHONES

logger = logging.getLogger(__name__)

_WORDS = {"shape": SHAPES, "colour": COLOURS, "letter": LETTERS, "column": COLUMN_WORDS, "row": ROW_WORDS}
# Where the words of each field of an object stand among `SCENE_WORDS`; sky and ground come after them.
FIELDS = {name: (SCENE_WORDS.index(next(iter(words))), len(words)) for name, words in _WORDS.items()}
NUM_OBJECT_WORDS = sum(num_words for _, num_words in FIELDS.values())
NUM_BACKGROUNDS = len(SCENE_WORDS) - NUM_OBJECT_WORDS
PIXEL_MEAN = PIXEL_STD = 0.5


@dataclass(frozen=True)
class Images:
    """Normalised pixels (B, 3, 128, 128) and the bags of their patches (B, 64, K)."""

    pixels: Tensor
    bags: Tensor


class PatchReader(nn.Module):
    """Holds the linear maps that are trained on top of the encoder and thrown away after it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.classes = nn.Linear(hidden_size, len(SCENE_WORDS) + 1)  # the last class: no object here
        self.bag = nn.Linear(hidden_size, len(SCENE_WORDS))


def vision_config() -> CLIPVisionConfig:
    """Give the shipped architecture: 3 layers of width 128 on 64 patches of 16 pixels, about 0.6 million parameters."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_PIXELS,
        patch_size=CELL_PIXELS,
        hidden_act="gelu_pytorch_tanh",
    )


def pretrain_vision(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 900,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    examine_every_steps: int = 200,
) -> dict[str, float]:
    """Train the encoder and write it to `out` in float16 with its image processor's config and `log_vision.jsonl`.

    Args:
        out: folder for the checkpoint; an interim one is written at every examination.
        seed: of the initial weights and of the scenes.
        steps: optimizer steps of `batch_size` new images each.
        learning_rate: the highest one of a warm-up and a cosine.
        examine_every_steps: steps between two examinations on the validation split.

    Returns:
        the results of the last examination, in percent of patches.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(seed)
    encoder, reader = CLIPVisionModel(vision_config()).train(), PatchReader(vision_config().hidden_size)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    batches = image_batches("train", seed, batch_size)
    results: dict[str, float] = {}
    with (out / "log_vision.jsonl").open("w") as log:
        facts = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
        write_line(log, header(encoder, **facts))
        for step in range(1, steps + 1):
            done = step / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(done / 0.05, 0.5 * (1.0 + math.cos(math.pi * done)))
            loss = patch_loss(reader, patch_features(encoder, (batch := next(batches)).pixels), batch.bags)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % examine_every_steps == 0 or step == steps:
                results = examine_encoder(encoder.eval(), reader, seed=seed)
                encoder.train()
                row = {"step": step, "seconds": round(time.monotonic() - started), "loss": round(float(loss), 4)}
                write_line(log, row | results)
                logger.info("step %d loss %.4f %s", step, row["loss"], json.dumps(results))
                save_encoder(encoder, out)
    return results


def image_batches(split: str, seed: int, batch_size: int) -> Iterator[Images]:
    """Yield batches of new scenes of one split without end."""
    scenes = random_scenes(split, seed)
    while True:
        yield render_images(list(islice(scenes, batch_size)))


def render_images(scenes: list[Scene]) -> Images:
    """Render scenes, scale their pixels to -1..1, and put the bags of their patches beside them."""
    pixels = torch.from_numpy(np.stack([np.asarray(render_scene(scene)) for scene in scenes]))
    bags = torch.from_numpy(np.stack([scene_bags(scene)[:, len(PHONES) :] for scene in scenes]))
    return Images((pixels.permute(0, 3, 1, 2).float() / 255.0 - PIXEL_MEAN) / PIXEL_STD, bags)


def patch_features(encoder: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Compute the patch tokens of the last layer, (B, 64, D), without the class token."""
    return encoder(pixel_values=pixels).last_hidden_state[:, 1:]


def patch_loss(reader: PatchReader, features: Tensor, bags: Tensor) -> Tensor:
    """Sum the cross entropy of the classes, the squared error of the bags, and a pull of the features to unit size."""
    logits, is_object = reader.classes(features), bags[..., :NUM_OBJECT_WORDS].sum(dim=-1) > 0
    # An object's five fields are classified apart: the words of one field share a softmax.
    classes = sum(
        F.cross_entropy(
            logits[is_object].narrow(1, first, number), bags[is_object].narrow(1, first, number).argmax(dim=-1)
        )
        for first, number in FIELDS.values()
    )
    background = F.cross_entropy(logits[..., NUM_OBJECT_WORDS:].flatten(0, 1), _background_of(bags).flatten())
    # Objects are few: averaged by themselves, their bags count as much as those of all the background.
    error = (reader.bag(features) - bags).square().sum(dim=-1)
    size = (features.square().mean(dim=-1).sqrt() - 1.0).square().mean()
    return classes + background + error[is_object].mean() + error[~is_object].mean() + 0.1 * size


@torch.no_grad()
def examine_encoder(
    encoder: CLIPVisionModel, reader: PatchReader, *, split: str = "validation", num_scenes: int = 192, seed: int = 0
) -> dict[str, float]:
    """Measure the percent of object patches of which each field is read, of all patches whose background is, and of the
    variance of the bags that a linear map explains at 64, 16, 4 and 1 pooled features."""
    batch = next(image_batches(split, seed, num_scenes))
    features = patch_features(encoder, batch.pixels)
    logits, is_object = reader.classes(features), batch.bags[..., :NUM_OBJECT_WORDS].sum(dim=-1) > 0
    results = {}
    for name, (first, number) in FIELDS.items():
        predicted, label = (values[is_object].narrow(1, first, number).argmax(-1) for values in (logits, batch.bags))
        results[name] = round(100.0 * float((predicted == label).float().mean()), 2)
    right = logits[..., NUM_OBJECT_WORDS:].argmax(-1) == _background_of(batch.bags)
    results["background"] = round(100.0 * float(right.float().mean()), 2)
    for side in (8, 4, 2, 1):
        predicted, label = _pooled(reader.bag(features), side), _pooled(batch.bags, side)
        error = (predicted - label).square().sum() / (label - label.mean(dim=(0, 1))).square().sum()
        results[f"bags{side * side}_explained"] = round(100.0 * (1.0 - float(error)), 2)
    results["feature_rms"] = round(float(features.square().mean().sqrt()), 3)
    return results


def save_encoder(encoder: CLIPVisionModel, out: Path) -> None:
    """Write weights in float16, the config, and the config of an image processor that keeps 128 x 128 pixels."""
    save_half(encoder, out)
    CLIPImageProcessor(
        size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    ).save_pretrained(out)


def _background_of(bags: Tensor) -> Tensor:
    """Look up (B, 64) which sky or ground a patch shows, or the number of them where an object stands."""
    is_object = bags[..., :NUM_OBJECT_WORDS].sum(dim=-1) > 0
    return torch.where(is_object, NUM_BACKGROUNDS, bags[..., NUM_OBJECT_WORDS:].argmax(dim=-1))


def _pooled(bags: Tensor, side: int) -> Tensor:
    return (
        F.adaptive_avg_pool2d(bags.transpose(1, 2).unflatten(2, (GRID_CELLS, GRID_CELLS)), side)
        .flatten(2)
        .transpose(1, 2)
    )
