"""Times a training step at eight nested budgets of an image: eight passes as MQT-LLaVA runs them beside one packed
pass.

    python benchmarks/nested_step.py [--repeats 5] [--threads 1]

MQT-LLaVA (gordonhu608/MQT-LLaVA @92c35d0) trains one sampled budget per step (llava/model/multimodal_projector/
builder.py:58-60). `8 passes` runs that step once per budget, each with CLIP, the first m queries over keys that are
positions (builder.py:200-204), an LLM pass of its own, logits of every position in float32, and a backward pass.
`8 passes, encoded once` is the same without running CLIP again, which the released code does not do.

The model: the CLIP and LLM of `pooled_step.py`, and a query transformer of 256 queries. One sample: 40 tokens of system
prompt, an image, 32 of question, 32 of answer. Losses and all gradients must agree to 1e-5 before anything is timed.
"""

from dataclasses import replace
from functools import partial

import torch
from pooled_step import VISION
from side_by_side import (
    Budget,
    Compared,
    build,
    compare_steps,
    packed_llm_flops,
    packed_step,
    rows_of,
    words,
)
from torch import Tensor
from torch.nn import functional
from turns import options

from mllm.compressors import Query
from mllm.config.medium import ImageConfig, ImageEncoderConfig, ImageQueryConfig
from mllm.config.model import LoraConfig, ModelConfig
from mllm.evaluation.flops import Item, compressor_flops, encoder_flops, llm_flops
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.training.step import fixed_views, make_training_batch

COUNTS = (256, 144, 64, 36, 16, 8, 4, 2)
BUDGETS = [Budget.parse(f"image={count}") for count in COUNTS]
SYSTEM, QUESTION, ANSWER = 40, 32, 32
GOAL = 1.9


def example() -> tuple[ElasticForConditionalGeneration, ElasticProcessor, Batch]:
    """Build the model of the head of this file and its one sample."""
    encoder = ImageEncoderConfig(source="random")
    medium = ImageConfig(encoder=encoder, compressor=ImageQueryConfig(num_queries=256), budgets=list(COUNTS))
    lora = LoraConfig(rank=16, targets=["q_proj", "v_proj"])
    model, processor = build(
        ModelConfig(llm="random", chat_format="plain", image=medium, adapter=lora), {"image": VISION}
    )
    image = LoadedMedia("image", torch.randn(3, 336, 336, generator=torch.Generator().manual_seed(1)))
    return model, processor, rows_of(processor, [([words(SYSTEM), image, words(QUESTION)], words(ANSWER))])


def mqt_passes(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch, *, encode_once: bool
) -> float:
    """Go forward and backward once per budget."""
    total = 0.0
    known = encode(model, batch) if encode_once else None
    for budget, count in zip(BUDGETS, COUNTS, strict=True):
        expanded = processor.expand(batch, [[budget]], left_padding=False)
        ids = expanded.inputs["input_ids"]
        is_image = ids == processor.placeholder_ids["image"]
        embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        soft = resampled(model, encode(model, batch) if known is None else known, count)
        embeds = embeds.masked_scatter(is_image[..., None], soft)
        mask = expanded.inputs["attention_mask"]
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)[0]
        logits = model.lm_head(hidden).float()
        shifted = logits[..., :-1, :].contiguous().flatten(0, 1)
        loss = functional.cross_entropy(shifted, expanded.labels[..., 1:].flatten()) / len(BUDGETS)
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def encode(model: ElasticForConditionalGeneration, batch: Batch) -> Tensor:
    """Run CLIP."""
    return model.model.encoder("image")(batch.values["pixel_values"])


def resampled(model: ElasticForConditionalGeneration, features: Tensor, count: int) -> Tensor:
    """Run the first queries, and no others, over all features."""
    compressor = model.model.compressors["image"]
    assert isinstance(compressor, Query)
    states, positions = compressor.kv_proj(features), compressor.key_positions()
    query = compressor.ln_q((compressor.query + compressor.pos_embed)[:count])
    return compressor.attn(query[None], compressor.ln_k(positions)[None], compressor.ln_v(states)) @ compressor.proj


def predicted(model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch) -> dict[str, float]:
    """Count FLOPs by the model of costs: what is frozen goes forward, or forward and back; the compressor learns."""
    config = model.config
    medium = config.media["image"]
    encoder = encoder_flops(config.encoder_configs["image"], Item("image", 576, 256), medium.encoder)
    # In training nothing is folded, and keys that are never folded cost what position keys cost unfolded.
    unfolded = replace(medium, compressor=replace(medium.compressor, keys="content"))
    learned = [3 * compressor_flops(unfolded, Item("image", 576, n), in_size=256, out_size=512) for n in COUNTS]
    lengths = [len(batch.rows[0].ids) - 1 + count for count in COUNTS]
    passes = [llm_flops(config.text_config, num_tokens=n, num_logits=n, adapter=config.adapter) for n in lengths]
    training_batch = make_training_batch(batch, fixed_views(batch.rows, BUDGETS), processor, packed=True)
    assert training_batch.plan is not None
    packed = packed_llm_flops(config, training_batch.plan, num_logits=len(training_batch.positions))
    alone = sum(learned) + 2 * sum(passes)
    return {
        "8 passes": 8 * encoder + alone,
        "8 passes, encoded once": encoder + alone,
        "packed": encoder + max(learned) + 2 * packed,
    }


def main() -> None:
    """Check, measure and print."""
    arguments = options(__doc__, 5)
    model, processor, batch = example()
    runs = {
        "8 passes": partial(mqt_passes, model, processor, batch, encode_once=False),
        "8 passes, encoded once": partial(mqt_passes, model, processor, batch, encode_once=True),
        "packed": partial(packed_step, model, processor, batch, BUDGETS),
    }
    pairs = [
        Compared("step at 8 nested budgets, packed", "packed", against, baseline, goal)
        for baseline, against, goal in (
            ("8 passes", "8 passes, the encoder in each", None),
            ("8 passes, encoded once", "8 passes of MQT-LLaVA's, encoded once", GOAL),
        )
    ]
    compare_steps(
        model, runs, arguments, title=f"budgets {COUNTS}", flops=predicted(model, processor, batch), pairs=pairs
    )


if __name__ == "__main__":
    main()
