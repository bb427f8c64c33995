"""Times a training step on one clip with three tasks, by audio, video and both: Omni-AVSR's beside one packed pass.

    python benchmarks/speech_step.py [--repeats 5] [--threads 1]

The baseline does what umbertocappellazzo/Omni-AVSR @7de6be2 does, on the weights of the same model: both encoders once,
Whisper on its full window of 30 seconds (modeling_OmniAVSR.py:528-537), one rate per medium (:474, :549), then one LLM
pass per task (:268-303) with logits of every position in float32 (Llama_LoRA.py:372-386), and one backward pass of the
mean of the weighted losses (lightning_OmniAVSR.py:161-162). Turning audio into log-mel features on the main thread,
which it does too, is left out of both. `packed, cached` has the encoders' features already, as `data.features` keeps
them; Omni-AVSR has no such thing, and its released commands could not use all of it, since they train a LoRA inside
AV-HuBERT and augment what it sees. The second comparison has that LoRA, whose video encoder runs and goes backward in
every way; `audio cached` has Whisper's features alone.

The model: Whisper and AV-HuBERT that cost beside this LLM what Whisper-medium and AV-HuBERT Large cost beside
Llama-3.2-1B, a projector per rate, an LLM with LoRA shared by the tasks whose head is 21 % of its FLOPs. One sample: 6
seconds at rates 4 and 2, 8 tokens of instruction, 28 of answer. Losses and all gradients must agree to 1e-5.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from side_by_side import (
    CPU,
    Budget,
    Compared,
    build,
    compare_steps,
    learn,
    packed_llm_flops,
    rows_of,
    words,
)
from torch import Tensor
from torch.nn import functional
from transformers import WhisperConfig
from turns import options

from mllm.config.medium import AudioConfig, AudioEncoderConfig, EncoderAdapterConfig, LipsConfig, MlpConfig, VideoConfig
from mllm.config.model import LoraConfig, ModelConfig
from mllm.encoders import AVHubertConfig
from mllm.evaluation.flops import Item, compressor_flops, encoder_flops, llm_flops
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.training.step import TrainingBatch, fixed_views, frozen_features, make_training_batch, num_targets

SECONDS = 6
RATES = {"audio": 4, "video": 2}
BUDGET = Budget.parse("audio=/4,video=/2")
WEIGHTS = {"asr": 1.0, "vsr": 1.5, "avsr": 1.0}
GOALS = {"packed": 1.15, "packed, cached": 2.2}


LipsAdapter = EncoderAdapterConfig | None
LIPS_LORA = EncoderAdapterConfig(rank=16, alpha=32)


def example(
    lips_adapter: LipsAdapter = None,
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor, Batch]:
    """Build the model of the head of this file, and three rows that show the same clip."""
    whisper = WhisperConfig(
        d_model=256, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=1024, decoder_layers=1
    )
    av_hubert = AVHubertConfig(
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=1024,
        resnet_channels=[8, 16, 32, 64],
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), 0.0),
    )
    projector, lips_encoder = (
        MlpConfig(per_budget=True),
        LipsConfig(source="random", crop_pixels=32, adapter=lips_adapter),
    )
    audio = AudioConfig(encoder=AudioEncoderConfig(source="random"), projector=projector, budgets=["/4", "/16"])
    video = VideoConfig(encoder=lips_encoder, projector=projector, budgets=["/2", "/5"])
    lora = LoraConfig(rank=16, targets=["q_proj", "v_proj"])
    settings = ModelConfig(llm="random", chat_format="plain", audio=audio, video=video, adapter=lora)
    model, processor = build(settings, {"audio": whisper, "video": av_hubert})
    generator = torch.Generator().manual_seed(1)
    log_mel = LoadedMedia("audio", torch.randn(80, 3000, generator=generator), SECONDS * 16_000)
    frames = LoadedMedia("video", torch.randn(SECONDS * 25, 1, 88, 88, generator=generator), SECONDS * 25)
    prompt, answer = words(8), words(28)
    tasks = [([log_mel, prompt], answer), ([frames, prompt], answer), ([log_mel, frames, prompt], answer)]
    batch = rows_of(processor, tasks)
    rows = [replace(row, task=task) for row, task in zip(batch.rows, WEIGHTS, strict=True)]
    return model, processor, replace(batch, rows=rows)


def omni_step(model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch) -> float:
    """Go forward once per task, then backward once."""
    soft = {medium: projected(model, batch, medium) for medium in RATES}
    losses = []
    for row in batch.rows:
        expanded = processor.expand(Batch([row], batch.values), [[BUDGET]], left_padding=False)
        ids = expanded.inputs["input_ids"]
        masks = {medium: ids == placeholder for medium, placeholder in processor.placeholder_ids.items()}
        embeds = model.get_input_embeddings()(ids.masked_fill(masks["audio"] | masks["video"], 0))
        for medium, mask in masks.items():
            if mask.any():
                embeds = embeds.masked_scatter(mask[..., None], soft[medium])
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        logits = model.lm_head(hidden).float()
        shifted = logits[..., :-1, :].contiguous().flatten(0, 1)
        losses.append(WEIGHTS[row.task] * functional.cross_entropy(shifted, expanded.labels[..., 1:].flatten()))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item()


def projected(model: ElasticForConditionalGeneration, batch: Batch, medium: str) -> Tensor:
    """Run the encoder, the mean over windows, and the projector of the rate."""
    with torch.set_grad_enabled(learns(model, medium)):
        features = model.model.encode(medium, batch.values[f"{medium}_values"], batch.values[f"{medium}_lengths"])
    spoken = features.values[:, : int(features.lengths[0])]
    pooled = functional.avg_pool1d(spoken.transpose(1, 2), RATES[medium], RATES[medium]).transpose(1, 2)
    compressor: Any = model.model.compressors[medium]
    bank = compressor.projectors
    return bank[bank.budgets.index(RATES[medium])](pooled)


def learns(model: ElasticForConditionalGeneration, medium: str) -> bool:
    """Tell whether an encoder has a LoRA that learns."""
    return any(weight.requires_grad for weight in model.model.encoder(medium).parameters())


def training_batch_of(processor: ElasticProcessor, batch: Batch) -> TrainingBatch:
    """Pack all three tasks into one row."""
    views = fixed_views(batch.rows, [BUDGET])
    weighted = [replace(view, weight=WEIGHTS[batch.rows[view.row].task]) for view in views]
    return make_training_batch(batch, weighted, processor, packed=True)


def packed(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    batch: Batch,
    features: Mapping[str, Features] | None,
) -> float:
    """Go forward and backward once."""
    return learn(model, training_batch_of(processor, batch), num_targets(batch.rows), features)


def predicted(model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch) -> list[float]:
    """Count FLOPs by the model of costs, of the baseline and ours: what is frozen goes forward, or forward and back;
    projectors learn.
    """
    config, training_batch = model.config, training_batch_of(processor, batch)
    assert training_batch.plan is not None
    items = {"audio": Item("audio", 300, 75), "video": Item("video", 150, 75, 88, 88)}
    encoders = {
        m: encoder_flops(config.encoder_configs[m], item, config.media[m].encoder) * (2 if learns(model, m) else 1)
        for m, item in items.items()
    }
    every, learning = sum(encoders.values()), sum(flops for m, flops in encoders.items() if learns(model, m))
    projectors = sum(compressor_flops(config.media[m], item, in_size=256, out_size=512) for m, item in items.items())
    lengths = [len(row.ids) + 74 * len(row.spans) for row in batch.rows]
    passes = [llm_flops(config.text_config, num_tokens=n, num_logits=n, adapter=config.adapter) for n in lengths]
    ours = 2 * packed_llm_flops(config, training_batch.plan, num_logits=len(training_batch.positions)) + 3 * projectors
    return [every + 3 * projectors / 2 + 2 * sum(passes), every + ours, learning + ours]


def compare(
    arguments: argparse.Namespace, title: str, against: str, ways: Mapping[str, float | None], lips: LipsAdapter = None
) -> None:
    """Check, measure and print the ways on one model, by their names and goals."""
    model, processor, batch = example(lips)
    features = frozen_features(model, batch, CPU)
    baseline, *ours = names = ("Omni-AVSR's", *ways)
    runs = (omni_step, partial(packed, features=None), partial(packed, features=features))
    pairs = [Compared(f"step on 3 tasks of a clip, {way}", way, against, baseline, ways[way]) for way in ours]
    compare_steps(
        model,
        {name: partial(run, model, processor, batch) for name, run in zip(names, runs, strict=True)},
        arguments,
        title=title,
        flops=dict(zip(names, predicted(model, processor, batch), strict=True)),
        pairs=pairs,
    )


def main() -> None:
    """Compare without and with a LoRA in the encoder of lips."""
    arguments = options(__doc__, 5)
    title = f"three tasks of a clip of {SECONDS} s"
    compare(arguments, title, "step of Omni-AVSR, encoders frozen", GOALS)
    ways = {"packed": None, "packed, audio cached": None}
    compare(arguments, f"{title}, LoRA in AV-HuBERT", "step of Omni-AVSR, LoRA in AV-HuBERT", ways, LIPS_LORA)


if __name__ == "__main__":
    main()
