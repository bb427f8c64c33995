"""Times a training step at all five scales of a pooled image: the released M3 loop beside one packed pass.

    python benchmarks/pooled_step.py [--repeats 5] [--threads 1]

The baseline does what mu-cai/matryoshka-mm @ec30cd3 does, on the weights of the same model: for every scale a complete
forward pass (llava/model/language_model/llava_llama.py:155-190), which runs CLIP without gradient and the projector
with it (llava/model/multimodal_encoder/clip_encoder.py:46, llava/model/llava_arch.py:142-145), pools the projected grid
by avg_pool2d (llava_arch.py:147-157), and makes logits of every position in float32, which are kept and joined
(llava_llama.py:119-120, 176-178); the loss is the mean over scales, and one backward pass follows.

The model: CLIP with 24 x 24 patches that costs beside this LLM what CLIP-L/336 costs beside Llama-3.2-1B, and an LLM
with LoRA whose head is 21 % of its FLOPs. One sample: 40 tokens of system prompt, an image, 32 of question, 32 of
answer. Losses and all gradients must agree to 1e-5 before anything is timed. A second comparison computes the layers of
the LLM again in the backward pass in every way, as M3's finetune.sh does.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from side_by_side import (
    Budget,
    Compared,
    build,
    compare_steps,
    low_memory_step,
    packed_llm_flops,
    packed_step,
    rows_of,
    words,
)
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig
from turns import options

from mllm.config.medium import ImageConfig, ImageEncoderConfig, MlpConfig
from mllm.config.model import LoraConfig, ModelConfig
from mllm.evaluation.flops import Item, compressor_flops, encoder_flops, llm_flops
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.training.step import BudgetView, fixed_views, make_training_batch, split_by_budget, tokens_of_views

SCALES = (576, 144, 36, 9, 1)
BUDGETS = [Budget.parse(f"image={scale}") for scale in SCALES]
SYSTEM, QUESTION, ANSWER = 40, 32, 32
GOALS = {"packed": 1.6}
GOALS_COMPUTED_AGAIN = {"memory low": 1.3}


VISION = CLIPVisionConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=4,
    image_size=336,
    patch_size=14,
)
LORA = LoraConfig(rank=16, targets=["q_proj", "v_proj"])


def example(
    adapter: LoraConfig | None = LORA, rows: Sequence[tuple[int, int, int]] = ((SYSTEM, QUESTION, ANSWER),), **text: int
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor, Batch]:
    """Build the model of the head of this file and its one sample.

    Args:
        adapter: None where the whole LLM trains.
        rows: tokens of system prompt, question and answer of each sample.
        text: what is changed in the LLM's config.
    """
    encoder, projector = ImageEncoderConfig(source="random"), MlpConfig(before_pooling=True)
    medium = ImageConfig(encoder=encoder, projector=projector, budgets=list(SCALES))
    model, processor = build(
        ModelConfig(llm="random", chat_format="plain", image=medium, adapter=adapter), {"image": VISION}, **text
    )
    if adapter is None:
        set_trainables(model, ("compressors", "llm"))
    generator = torch.Generator().manual_seed(1)
    samples = []
    for system, question, answer in rows:
        image = LoadedMedia("image", torch.randn(3, 336, 336, generator=generator))
        samples.append(([words(system), image, words(question)], words(answer)))
    return model, processor, rows_of(processor, samples)


def m3_step(model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch) -> float:
    """Go forward at all scales, then backward once."""
    losses, all_logits = [], []
    for budget, scale in zip(BUDGETS, SCALES, strict=True):
        expanded = processor.expand(batch, [[budget]], left_padding=False)
        features = pooled_features(model, batch.values["pixel_values"], scale)
        ids = expanded.inputs["input_ids"]
        is_image = ids == processor.placeholder_ids["image"]
        embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        embeds = embeds.masked_scatter(is_image[..., None], features)
        mask = expanded.inputs["attention_mask"]
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)[0]
        logits = model.lm_head(hidden).float()
        shifted = logits[..., :-1, :].contiguous().flatten(0, 1)
        losses.append(functional.cross_entropy(shifted, expanded.labels[..., 1:].flatten()))
        all_logits.append(logits)
    torch.cat(all_logits, dim=1)
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item()


def pooled_features(model: ElasticForConditionalGeneration, pixels: Tensor, scale: int) -> Tensor:
    """Run CLIP and the projector, and average over equal squares of the grid."""
    with torch.no_grad():
        features = model.model.encoder("image")(pixels)
    compressor: Any = model.model.compressors["image"]
    projected = compressor.projectors[0](features)
    grid = projected.transpose(1, 2).unflatten(2, (24, 24))
    size = int((576 / scale) ** 0.5)
    return functional.avg_pool2d(grid, kernel_size=size, stride=size).flatten(2).transpose(1, 2)


def predicted(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch, passes_of_llm: int
) -> dict[str, float]:
    """Count FLOPs by the model of costs: what is frozen goes forward, or forward and back; the projector learns.

    Args:
        passes_of_llm: 2, or 3 where it learns as a whole; one more where its layers are computed again.
    """
    config, rows = model.config, len(batch.rows)
    medium = config.media["image"]
    encoder = rows * encoder_flops(config.encoder_configs["image"], Item("image", 576, 576), medium.encoder)
    projector = rows * compressor_flops(medium, Item("image", 576, 1), in_size=256, out_size=512)
    longest = max(len(row.ids) for row in batch.rows)  # M3 pads the rows of a batch
    lengths = rows * [longest - 1 + scale for scale in SCALES]
    passes = [llm_flops(config.text_config, num_tokens=n, num_logits=n, adapter=config.adapter) for n in lengths]
    views = fixed_views(batch.rows, BUDGETS)
    groups = split_by_budget(views, tokens_of_views(batch.rows, views, processor.space))

    def in_one_pass(group: list[BudgetView]) -> int:
        training_batch = make_training_batch(batch, group, processor, packed=True)
        assert training_batch.plan is not None
        return packed_llm_flops(config, training_batch.plan, num_logits=len(training_batch.positions))

    return {
        "M3 loop": 5 * (encoder + 3 * projector) + passes_of_llm * sum(passes),
        "packed": encoder + 3 * projector + passes_of_llm * in_one_pass(views),
        "memory low": encoder + 3 * len(groups) * projector + passes_of_llm * sum(map(in_one_pass, groups)),
    }


def main() -> None:
    """Check, measure and print."""
    arguments = options(__doc__, 5)
    model, processor, batch = example()
    runs = {
        "M3 loop": partial(m3_step, model, processor, batch),
        "packed": partial(packed_step, model, processor, batch, BUDGETS),
        "memory low": partial(low_memory_step, model, processor, batch, BUDGETS),
    }
    for suffix, goals, passes_of_llm in (("", GOALS, 2), (", layers computed again", GOALS_COMPUTED_AGAIN, 3)):
        if suffix:
            model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        pairs = [
            Compared(f"step at 5 scales, {way}{suffix}", way, f"loop of M3{suffix}", "M3 loop", goals.get(way))
            for way in ("packed", "memory low")
        ]
        flops = predicted(model, processor, batch, passes_of_llm)
        title = f"step at scales {SCALES}{suffix}"
        compare_steps(model, runs, arguments, title=title, flops=flops, pairs=pairs)


if __name__ == "__main__":
    main()
