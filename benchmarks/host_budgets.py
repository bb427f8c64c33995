"""Measures what pooling an image and seeing it smaller save, beside each other, by the encoder's share of the work.

    python benchmarks/host_budgets.py [--repeats 7] [--threads 1] [--side 672] [--new-tokens 16]

The hosts are small Qwen2.5-VLs with random weights, which take as long as trained ones. Their encoders and LLMs are so
sized that reading an image is divided between them as in models that are used: see `HOSTS`. The image has 576 soft
tokens (at a side of 672 pixels) by default. What is timed is what `mllm bench` times, in wall time: encoding, reading
the prompt, and so many new tokens. Before it, a host's logits at the full budget and of the smaller image must equal
those of transformers' own pipeline, bit for bit. The baseline is the host at its full budget.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from outcomes import Outcome, append, timed
from PIL import Image
from rich.console import Console
from rich.table import Table
from turns import options, spread

from mllm.budget import Budget
from mllm.checkpoints import adoption
from mllm.checkpoints.build import build
from mllm.commands.adopt import cost_shares
from mllm.config.model import ModelConfig
from mllm.config.reading import read
from mllm.evaluation.bench import Measured, bench, requests
from mllm.hosts.processor import with_read_parts
from mllm.inference.answerer import Decoding
from mllm.inference.timing import PHASES
from mllm.synthetic.tokenizer import build_tokenizer

TOKEN_PIXELS = 28
"""Side of what becomes one soft token: patches of 14 pixels, merged 2 x 2."""
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
NAMES = ("full", "pooled to 1/4", "seen at 1/4", "pooled to 1/16", "seen at 1/16", "pooled to 1/4, seen at 1/4")


@dataclass(frozen=True)
class Sizes:
    """Says how wide, how deep and how large in their MLPs the encoder and the LLM are."""

    encoder: tuple[int, int, int]
    llm: tuple[int, int, int]


HOSTS = {
    "LLaVA-1.5-7B": Sizes((48, 2, 128), (512, 8, 1408)),
    "Qwen2.5-VL-7B": Sizes((144, 4, 400), (512, 8, 1408)),
    "Qwen2.5-VL-3B": Sizes((176, 4, 480), (384, 8, 1024)),
    "SmolVLM2-500M": Sizes((288, 4, 768), (256, 8, 704)),
}
"""By the model whose division of the work they have: about 4, 27, 46 and 80 % are the encoder's."""


def write_host(sizes: Sizes, folder: Path, side: int) -> str:
    """Save a host with random weights as a hub would hold it."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATE
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    width, depth, inner = sizes.encoder
    hidden, layers, mlp = sizes.llm
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            **{"depth": depth, "num_heads": 4, "hidden_size": width, "intermediate_size": inner, "patch_size": 14},
            **{"out_hidden_size": hidden, "window_size": 112, "fullatt_block_indexes": [depth - 1]},
        },
        text_config={
            **{"vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": mlp},
            **{"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8},
            **{"max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [hidden // 64 * n for n in (1, 1, 2)],
            },
        },
        tie_word_embeddings=False,
        **dict(zip(keys, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True)),
    )
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    with_read_parts(transformers.Qwen2_5_VLProcessor, "image")(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * TOKEN_PIXELS**2, "longest_edge": side**2}
        ),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def budgets_of(side: int) -> list[Budget]:
    """List the budgets that `NAMES` names, for an image of a side in pixels."""
    tokens = (side // TOKEN_PIXELS) ** 2
    fewer, few = tokens // 4, tokens // 16
    words = ("image=/1", "image=/4", f"image<={fewer}", "image=/16", f"image<={few}", f"image=/4,image<={fewer}")
    return [Budget.parse(one) for one in words]


@torch.no_grad()
def check(folder: str, model: Any, processor: Any, image: Image.Image, seen: Sequence[Budget]) -> None:
    """Compare what is to be timed with the host's own pipeline, where it has an answer of its own.

    Raises:
        ValueError: logits that differ.
    """
    host = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    for budget in seen:
        most = budget.max_image_tokens
        smaller = None
        if most is not None:
            resolution = processor.host.resizing.at_most((image.height, image.width), most)
            smaller = processor.host.resizing.keywords(resolution.setting)
        theirs = adoption.host_inputs(processor, image, host, images_kwargs=smaller)
        ours = processor(text=adoption.QUESTION, images=[image], budget=str(budget))
        if not torch.equal(model(**ours).logits, host(**theirs).logits):
            raise ValueError(f"{budget}: the logits are not the host's own")


def measure(sizes: Sizes, arguments: Any) -> tuple[float, list[Measured]]:
    """Make a host, compare it with itself, and time it at every budget; the encoder's share comes first."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_host(sizes, Path(name) / "host", arguments.side)
        findings = adoption.examine(folder)
        values = {"host": folder, "image": {"budgets": list(findings.budgets)}, "adapter": {"kind": "gated_lora"}}
        model, processor = build(read(ModelConfig, values, path="model"))
        model.eval()
        pixels = torch.randint(0, 256, (arguments.side, arguments.side, 3), dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        budgets = budgets_of(arguments.side)
        check(folder, model, processor, image, [one for one in budgets if not one.media or str(one) == "image=/1"])
        batches = {}
        for budget in budgets:
            seen = Budget(max_image_tokens=budget.max_image_tokens)
            batches[budget] = requests(processor, [processor.transform("image", image, budgets=[seen])], None, 1)
        results = bench(
            model, processor, batches, decoding=Decoding(1, arguments.new_tokens), repeats=arguments.repeats, warmup=1
        )
        return cost_shares(folder, findings)[0], results


def first_token_ms(one: Measured) -> list[float]:
    """List the milliseconds to the first token of every repeat: encoding and reading the prompt."""
    return [sum(pair) for pair in zip(one.milliseconds("encoder_ms"), one.milliseconds("prefill_ms"), strict=True)]


def first_token_flops(one: Measured) -> float:
    """Count the FLOPs of the same."""
    assert one.cost is not None
    return one.cost.encoder + one.cost.compressor + one.cost.prefill


def rows_of(name: str, share: float, results: Sequence[Measured]) -> list[list[str]]:
    """Write the results of a host as cells."""
    full = results[0]
    rows = []
    for words, one in zip(NAMES, results, strict=True):
        phases = [f"{median(one.milliseconds(phase)):.0f}" for phase in PHASES]
        times = first_token_ms(one)
        gains = (median(first_token_ms(full)) / median(times), first_token_flops(full) / first_token_flops(one))
        first = [f"{name}, {share:.0%}" if one is full else "", words, str(one.answer.tokens["image"])]
        rows.append([*first, *phases, spread(times, digits=0), *(f"{gain:.2f}x" for gain in gains)])
    return rows


def outcomes_of(name: str, results: Sequence[Measured]) -> list[Outcome]:
    """Compare pooling with seeing less, at equal soft tokens."""
    return [
        timed(
            f"{name}: {NAMES[seen]}",
            NAMES[pooled],
            first_token_ms(results[pooled]),
            first_token_ms(results[seen]),
            check="both the host's own at full",
            predicted=first_token_flops(results[pooled]) / first_token_flops(results[seen]),
        )
        for pooled, seen in ((1, 2), (3, 4))
    ]


def main() -> None:
    """Measure all hosts and show one table."""
    arguments = options(__doc__, 7, side=672, new_tokens=16)
    tokens = arguments.side // TOKEN_PIXELS
    table = Table(title=f"{tokens} x {tokens} tokens, {arguments.threads} threads")
    phases = ("encoder ms", "prefill ms", "decode ms")
    for column in ("host, encoder's share", "budget", "tokens", *phases, "first token ms", "quicker", "by FLOP"):
        table.add_column(column)
    outcomes = []
    for name, sizes in HOSTS.items():
        share, results = measure(sizes, arguments)
        for row in rows_of(name, share, results):
            table.add_row(*row)
        outcomes += outcomes_of(name, results)
    Console(width=180).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
