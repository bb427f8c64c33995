"""Eight questions about one picture: the picture encoded and read once for all, beside once per question.

    python benchmarks/grouped_questions.py [--repeats 5] [--threads 1] [--questions 8] [--new-tokens 4] [--device cpu]

The model has random weights: a 6-layer Llama, 512 wide with 8 heads, and a CLIP of 6 layers, 384 wide, on 24 x 24
patches, pooled to 576, 144, 36, 9 and 1 tokens as M3 does. The baseline asks one question at a time in batches of one,
as the evaluation of M3 and MQT-LLaVA does, and encodes and reads the picture anew for each. A third run answers the
questions in one batch that shares the encoding but not what the LLM reads. All three run in this process in turns;
their answers are compared first, and any difference stops the benchmark. Shown are medians and the range of the middle
half. Times are CPU time of the process, or wall time on a GPU.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig
from turns import in_turns, options, spread

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.budget import Budget
from mllm.building import config_of_parts, put_adapters, space_settings
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.modeling import ElasticForConditionalGeneration
from mllm.processing import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.settings import AdapterSettings, MediumSettings, ModelSettings
from mllm.world.tokenizer import build_tokenizer

COUNTS = (576, 144, 36, 9, 1)
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
    medium: MediumSettings | None = None,
    adapter: AdapterSettings | None = None,
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """The model of the head of this file, or with another compressor or an adapter, and its processor."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    medium = medium or MediumSettings(encoder="random", budgets=list(COUNTS))
    settings = ModelSettings(llm="random", chat_format="plain", image=medium, adapter=adapter)
    placeholder_ids = {"image": tokenizer.convert_tokens_to_ids(PLACEHOLDER_TOKENS["image"])}
    torch.manual_seed(0)
    model = ElasticForConditionalGeneration(
        config_of_parts(settings, text_config=text, encoder_configs={"image": vision}, placeholder_ids=placeholder_ids)
    )
    put_adapters(model)
    with torch.no_grad():
        for parameter in model.parameters():  # initial values are so small that every question would have one answer
            if parameter.dim() > 1:
                parameter.mul_(3)
            if not parameter.any():
                parameter.normal_(std=0.02)
    own = {
        "encoder": vision.to_dict(),
        "preprocessor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": 336, "width": 336},
            "do_center_crop": False,
        },
        "space": space_settings(medium),
        "span": [],
    }
    processor = ElasticProcessor(tokenizer, elastic={"chat_format": "plain", "media": {"image": own}})
    model.to(device=device, dtype=dtype)  # pyright: ignore (PreTrainedModel.to is wrapped without its types)
    return model.eval(), processor


def runs_of(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, count: int, given: argparse.Namespace
) -> dict[str, Callable[[], list[list[int]]]]:
    """Ids of the answers to all questions, by the way they are found."""
    picture = LoadedMedia("image", torch.randn(3, 336, 336, generator=torch.Generator().manual_seed(count)))
    texts = [QUESTIONS[number % len(QUESTIONS)] for number in range(given.questions)]
    budget = Budget.parse(f"image={count}")

    def ids_of(own: list[str], *, share: bool) -> list[list[int]]:
        samples = [Sample("q", (Message("user", (Media("image", "x"), Text(text))),), task="vqa") for text in own]
        batch = processor.batch(samples, [[picture]] * len(own), for_training=False)
        inputs = processor.expand(batch, [[budget] * len(own)], left_padding=True, share_prefixes=share).inputs
        moved: dict[str, Tensor] = {key: value.to(model.device) for key, value in inputs.items()}
        length = given.new_tokens
        ids = model.generate(**moved, do_sample=False, max_new_tokens=length, min_new_tokens=length)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    return {
        "one at a time": lambda: [ids for text in texts for ids in ids_of([text], share=False)],
        "one batch": lambda: ids_of(texts, share=False),
        "grouped": lambda: ids_of(texts, share=True),
    }


def compare(given: argparse.Namespace) -> Table:
    """Equality first, then times in turns."""
    device = torch.device(given.device)
    model, processor = build_model(device, getattr(torch, given.dtype))
    table = Table(title=f"{given.questions} questions about one picture, {given.new_tokens} new tokens each: seconds")
    for column in ("soft tokens", "one at a time", "one batch", "grouped", "times faster", "than one batch"):
        table.add_column(column, justify="right")
    for count in COUNTS:
        runs = runs_of(model, processor, count, given)
        answers = {name: run() for name, run in runs.items()}
        if given.dtype == "float32" and any(found != answers["grouped"] for found in answers.values()):
            raise SystemExit(f"{count} tokens: the answers differ: {answers}")
        times = in_turns({name: lambda _, run=run: run() for name, run in runs.items()}, given.repeats, device)
        medians = {name: statistics.median(own) for name, own in times.items()}
        ratios = [medians[name] / medians["grouped"] for name in ("one at a time", "one batch")]
        table.add_row(str(count), *(spread(times[name]) for name in runs), *(f"{ratio:.2f}" for ratio in ratios))
    return table


def main() -> None:
    given = options(__doc__, 5, questions=8, new_tokens=4, with_device=True)
    Console(width=140).print(compare(given))


if __name__ == "__main__":
    main()
