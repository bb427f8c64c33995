"""Beam search whose prompt is read once beside the library's own; and real-time factor and memory of speech budgets.

    python benchmarks/beam_decoding.py [--repeats 5] [--threads 1] [--beams 15] [--new-tokens 25] [--device cpu]

The model has random weights: a 12-layer Llama, 768 wide with 12 heads and 4 for keys, 16384 words, and a Whisper of 6
layers, 512 wide, on 30-second windows. The first table compares ids and times of `generate(num_beams=...)` and of
transformers' own on the same embeddings of 160-token prompts; both alternate, and what is shown are medians and the
range of the middle half. The second tells, for every audio rate, seconds of compute per second of sound, encoder
included, and the most memory above the weights. Times are CPU time of the process, or wall time on a GPU.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, WhisperConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.budget import Budget
from mllm.building import config_of_parts, space_settings
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.expansion import Batch
from mllm.modeling import ElasticForConditionalGeneration
from mllm.modeling_body import MEDIA_KEYS
from mllm.processing import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.settings import MediumSettings, ModelSettings
from mllm.world.tokenizer import build_tokenizer

SECONDS = 6
RATES = (1, 2, 4, 8, 16)
PREFIX_TOKENS = 160
VOCABULARY = 16384


@dataclass(frozen=True)
class Clock:
    """Times runs on one device."""

    device: torch.device

    def now(self) -> float:
        """CPU seconds of this process, or wall seconds once the GPU is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def alternate(self, runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        """Seconds of every run, in turn, after one round that does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                started = self.now()
                run()
                if repeat:
                    seconds[name].append(self.now() - started)
        return seconds

    def peak_megabytes(self, run: Callable[[], object]) -> float:
        """The most memory a run holds above what is held before it."""
        if self.device.type != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
        run()
        return (_resident("VmHWM") - before) / 1e3


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def build_model(
    device: torch.device, dtype: torch.dtype, rates: Sequence[int] = RATES
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """The model of the head of this file, and its processor."""
    tokenizer = build_tokenizer()
    audio = WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, decoder_layers=1
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    medium = MediumSettings(encoder="random", budgets=[f"/{rate}" for rate in rates])
    settings = ModelSettings(llm="random", chat_format="plain", audio=medium)
    placeholder_ids = {"audio": tokenizer.convert_tokens_to_ids(PLACEHOLDER_TOKENS["audio"])}
    torch.manual_seed(0)
    model = ElasticForConditionalGeneration(
        config_of_parts(settings, text_config=text, encoder_configs={"audio": audio}, placeholder_ids=placeholder_ids)
    )
    own = {
        "encoder": audio.to_dict(),
        "preprocessor": {"feature_size": 80, "feature_extractor_type": "WhisperFeatureExtractor"},
        "space": space_settings(medium),
        "span": [],
    }
    processor = ElasticProcessor(tokenizer, elastic={"chat_format": "plain", "media": {"audio": own}})
    model.to(device=device, dtype=dtype)  # pyright: ignore (PreTrainedModel.to is wrapped without its types)
    return model.eval(), processor


def build_batch(processor: ElasticProcessor, num_rows: int, words: int = 1) -> Batch:
    """Rows of six seconds of random sound and a question of so many words."""
    generator = torch.Generator().manual_seed(1)
    asked = (Media("audio", "none"), Text(" ".join(["transcribe"] * words)))
    messages = (Message("user", asked), Message("assistant", (Text("place blue at f two now"),)))
    samples = [Sample(f"row{number}", messages, task="asr") for number in range(num_rows)]
    media = [[LoadedMedia("audio", torch.randn(80, 3000, generator=generator), SECONDS * 16_000)] for _ in samples]
    return processor.batch(samples, media, for_training=False)


def prompts(processor: ElasticProcessor, batch: Batch, rate: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of `generate` at one rate."""
    inputs = processor.expand(batch, [[Budget.parse(f"audio=/{rate}")] * len(batch.rows)], left_padding=True).inputs
    return {key: value.to(device) for key, value in inputs.items()}


def prefix_prompts(processor: ElasticProcessor, num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts of 160 tokens: 150 soft ones (rate 2), the rest words."""
    for words in range(1, PREFIX_TOKENS):
        inputs = prompts(processor, build_batch(processor, num_rows, words), 2, device)
        if inputs["input_ids"].shape[1] >= PREFIX_TOKENS:
            return inputs
    raise AssertionError("words are tokens")


@torch.no_grad()
def embed(model: ElasticForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Encoder and compressor, which both searches run once."""
    return model.model.embed(inputs["input_ids"], {key: inputs.get(key) for key in MEDIA_KEYS})


@torch.no_grad()
def library(model: ElasticForConditionalGeneration, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """transformers' own search: embeddings made once, the prompt read by every beam."""
    embeds = embed(model, inputs)
    rest = {key: value for key, value in inputs.items() if key not in (*MEDIA_KEYS, "input_ids")}
    ids = inputs["input_ids"].clamp(max=VOCABULARY - 1)
    found: Any = GenerationMixin.generate(model, ids, inputs_embeds=embeds, **rest, **options)  # pyright: ignore
    return found


def compare(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, given: argparse.Namespace, clock: Clock
) -> Table:
    """The first table.

    Raises:
        SystemExit: ids differ.
    """
    options = {"num_beams": given.beams, "max_new_tokens": given.new_tokens, "min_new_tokens": given.new_tokens}
    options["do_sample"] = False
    table = Table(title=f"{given.beams} beams, {given.new_tokens} new tokens, {PREFIX_TOKENS}-token prompts")
    columns = ["rows", "ids", "transformers s", "prompt read once s", "encoder of both s", "ratio", "without encoder"]
    for name in (*columns, "peak MB", "peak MB read once"):
        table.add_column(name, justify="right")
    for rows in given.rows:
        inputs = prefix_prompts(processor, rows, clock.device)
        runs = {
            "library": partial(library, model, inputs, options),
            "shared": partial(model.generate, **inputs, **options),
        }
        length = inputs["input_ids"].shape[1]
        expected, found = (run()[:, length:].tolist() for run in runs.values())
        if expected != found:
            raise SystemExit("FAILED: the ids differ from those of the library")
        seconds = clock.alternate({**runs, "encoder": partial(embed, model, inputs)}, given.repeats)
        plain, shared, encoder = (statistics.median(own) for own in seconds.values())
        ratios = [f"{plain / shared:.2f}x", f"{(plain - encoder) / (shared - encoder):.2f}x"]
        peaks = [f"{clock.peak_megabytes(run):.0f}" for run in runs.values()]
        table.add_row(str(rows), "equal", *map(_spread, seconds.values()), *ratios, *peaks)
    return table


def budgets(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, given: argparse.Namespace, clock: Clock
) -> Table:
    """The second table."""
    table = Table(title=f"one {SECONDS}-second utterance, {given.new_tokens} new tokens, encoder included")
    for name in ("rate", "prompt tokens"):
        table.add_column(name, justify="right")
    for beams in (1, given.beams):
        table.add_column(f"real-time factor, {beams} beams", justify="right")
        table.add_column("peak MB", justify="right")
    batch = build_batch(processor, 1)
    runs: dict[tuple[int, int], Callable[[], object]] = {}
    lengths = {}
    for rate in RATES:
        inputs = prompts(processor, batch, rate, clock.device)
        lengths[rate] = inputs["input_ids"].shape[1]
        for beams in (1, given.beams):
            options = {"num_beams": beams, "max_new_tokens": given.new_tokens, "min_new_tokens": given.new_tokens}
            runs[rate, beams] = partial(model.generate, **inputs, **options, do_sample=False)
    seconds = clock.alternate({str(key): run for key, run in runs.items()}, given.repeats)
    for rate in RATES:
        cells = []
        for beams in (1, given.beams):
            times = [one / SECONDS for one in seconds[str((rate, beams))]]
            cells += [_spread(times), f"{clock.peak_megabytes(runs[rate, beams]):.0f}"]
        table.add_row(f"/{rate}", str(lengths[rate]), *cells)
    return table


def _spread(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beams", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=25)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = Clock(torch.device(given.device))
    model, processor = build_model(clock.device, getattr(torch, given.dtype))
    console = Console(width=140)
    console.print(compare(model, processor, given, clock))
    console.print(budgets(model, processor, given, clock))


if __name__ == "__main__":
    main()
