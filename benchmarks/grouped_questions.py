"""Answers eight questions about one image: the image encoded and read once for all, beside once per question.

    python benchmarks/grouped_questions.py [--repeats 5] [--threads 1] [--questions 8] [--new-tokens 4] [--device cpu]

The model has random weights: a 6-layer Llama, 512 wide with 8 heads, and a CLIP of 6 layers, 384 wide, on 24 x 24
patches, pooled to 576, 144, 36, 9 and 1 tokens as M3 does. The baseline asks one question at a time in batches of one,
as the evaluation of M3 does (mu-cai/matryoshka-mm @ec30cd3, llava/eval/model_vqa_loader.py:73, which refuses larger
ones; MQT-LLaVA's is the same), and encodes and reads the image anew for each. A third run answers the questions in
one batch that shares the encoding but not what the LLM reads. All three run in this process in turns; their answers are
compared first, and any difference stops the benchmark. Shown are medians and the range of the middle half, and beside
the ratio the one that FLOPs (`mllm/evaluation/flops.py`) predict, which do not count the padding of shorter questions.
Times are CPU time of the process, or wall time on a GPU.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from outcomes import Outcome, append, in_float32, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig
from turns import in_turns, options, ratio_of, spread, unprepared

from mllm.budget import Budget
from mllm.checkpoints.build import config_of_parts, put_adapters
from mllm.config.medium import ImageConfig, ImageEncoderConfig
from mllm.config.model import AdapterConfig, ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.flops import Item, llm_flops, request_cost
from mllm.kv_cache.shared_prefix import num_common
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.synthetic.tokenizer import build_tokenizer

COUNTS = (576, 144, 36, 9, 1)
GOALS = {576: 4.0, 1: 3.0}
PATCHES = 576
VISION: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 336,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
QUESTIONS = (
    "what colour is the circle?",
    "how many objects are there?",
    "what is left of the square?",
    "is there a triangle?",
    "what is the letter in the middle?",
    "which number can be read?",
    "what is the largest object?",
    "describe the picture.",
)


def build_model(
    device: torch.device,
    dtype: torch.dtype,
    medium: ImageConfig | None = None,
    adapter: AdapterConfig | None = None,
    *,
    vision_sizes: Mapping[str, Any] = VISION,
    text_sizes: Mapping[str, Any] = TEXT,
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build the model of the head of this file, or with another compressor, adapter or sizes, and its processor."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(**vision_sizes)
    text = LlamaConfig(
        **text_sizes,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    medium = medium or ImageConfig(encoder=ImageEncoderConfig(source="random"), budgets=list(COUNTS))
    settings = ModelConfig(llm="random", chat_format="plain", image=medium, adapter=adapter)
    placeholder_ids = {"image": cast(int, tokenizer.convert_tokens_to_ids(PLACEHOLDER_TOKENS["image"]))}
    torch.manual_seed(0)
    model: Any = ElasticForConditionalGeneration(
        config_of_parts(settings, text_config=text, encoder_configs={"image": vision}, placeholder_ids=placeholder_ids)
    )
    put_adapters(model)
    with torch.no_grad():
        for parameter in model.parameters():  # initial values are so small that every question would have one answer
            if parameter.dim() > 1:
                parameter.mul_(3)
            if not parameter.any():
                parameter.normal_(std=0.02)
    resized = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "do_center_crop": False,
    }
    kept = ProcessorConfig(chat_format="plain", preprocessors={"image": resized})
    processor = ElasticProcessor(tokenizer, model.config, kept)
    return model.to(device=device, dtype=dtype).eval(), processor


def questions_of(number: int) -> list[str]:
    """List so many questions."""
    return [QUESTIONS[index % len(QUESTIONS)] for index in range(number)]


def inputs_of(processor: ElasticProcessor, texts: list[str], count: int, *, share: bool) -> Mapping[str, Tensor]:
    """Make what the model is given for questions about one image, at so many soft tokens."""
    pixels = processor.facts["image"].image_pixels
    assert pixels is not None
    image = LoadedMedia("image", torch.randn(3, *pixels, generator=torch.Generator().manual_seed(count)))
    samples = [Sample("q", (Message("user", (Media("image", "x"), Text(text))),), task="vqa") for text in texts]
    batch: Batch = processor.batch(samples, [[image]] * len(texts), for_training=False)
    budgets = [[Budget.parse(f"image={count}")] * len(texts)]
    return processor.expand(batch, budgets, left_padding=True, share_prefixes=share).inputs


def predicted(config: Any, prompts: Sequence[Sequence[int]], count: int, num_new_tokens: int) -> float:
    """Compute the ratio of FLOPs, of prompts as long as they are."""
    text, adapter, common = config.text_config, config.adapter, num_common(prompts)
    item = Item("image", PATCHES, count)
    alone = [request_cost(config, [item], num_prompt_tokens=len(ids), num_new_tokens=num_new_tokens) for ids in prompts]
    grouped = alone[0].encoder + alone[0].compressor
    grouped += llm_flops(text, num_tokens=common, num_logits=1, adapter=adapter)
    for ids, cost in zip(prompts, alone, strict=True):
        left = len(ids) - common
        grouped += llm_flops(text, num_tokens=left, past_tokens=common, num_logits=1, adapter=adapter) + cost.decode
    return sum(cost.total for cost in alone) / grouped


def runs_of(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, count: int, arguments: argparse.Namespace
) -> dict[str, Callable[[], list[list[int]]]]:
    """Make the ids of the answers to all questions, by the way they are computed."""
    texts = questions_of(arguments.questions)

    def ids_of(some: list[str], *, share: bool) -> list[list[int]]:
        inputs = inputs_of(processor, some, count, share=share)
        moved: dict[str, Tensor] = {key: value.to(model.device) for key, value in inputs.items()}
        length = arguments.new_tokens
        ids = model.generate(**moved, do_sample=False, max_new_tokens=length, min_new_tokens=length)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    return {
        "one at a time": lambda: [ids for text in texts for ids in ids_of([text], share=False)],
        "one batch": lambda: ids_of(texts, share=False),
        "grouped": lambda: ids_of(texts, share=True),
    }


def compare(arguments: argparse.Namespace) -> tuple[Table, list[Outcome]]:
    """Check equality first, then time in turns."""
    device = torch.device(arguments.device)
    model, processor = build_model(device, getattr(torch, arguments.dtype))
    table = Table(
        title=f"{arguments.questions} questions about one image, {arguments.new_tokens} new tokens each: seconds"
    )
    for column in ("soft tokens", "one at a time", "one batch", "grouped", "times faster", "FLOPs", "than one batch"):
        table.add_column(column, justify="right")
    outcomes = []
    for count in COUNTS:
        runs = runs_of(model, processor, count, arguments)
        answers = {name: run() for name, run in runs.items()}
        if arguments.dtype == "float32" and any(ids != answers["grouped"] for ids in answers.values()):
            raise SystemExit(f"{count} tokens: the answers differ: {answers}")
        inputs = inputs_of(processor, questions_of(arguments.questions), count, share=False)
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        flops = predicted(model.config, [ids[mask].tolist() for ids, mask in rows], count, arguments.new_tokens)
        times = in_turns(unprepared(runs), arguments.repeats, device)
        alone, batched = (ratio_of(times[name], times["grouped"]) for name in ("one at a time", "one batch"))
        cells = (*map(spread, times.values()), f"{alone:.2f}", f"{flops:.2f}", f"{batched:.2f}")
        table.add_row(str(count), *cells)
        what = partial(
            timed,
            f"{arguments.questions} questions about an image, {count} tokens",
            fast=times["grouped"],
            check=in_float32("ids equal", arguments.dtype),
        )
        if count in GOALS:
            against = "one at a time, as M3's"
            outcomes.append(what(against, times["one at a time"], predicted=flops, goal=GOALS[count]))
        outcomes.append(what("one batch, encoded once", times["one batch"]))
    return table, outcomes


def main() -> None:
    arguments = options(__doc__, 5, questions=8, new_tokens=4, with_device=True)
    table, outcomes = compare(arguments)
    Console(width=140).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
