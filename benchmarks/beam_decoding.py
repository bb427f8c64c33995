"""Times beam search whose prompt is read once beside the library's, and speech budgets by real-time factor and memory.

    python benchmarks/beam_decoding.py [--repeats 5] [--threads 1] [--rows 1] [--beams 15] [--new-tokens 25]
        [--device cpu]

The model has random weights: a 12-layer Llama, 768 wide with 12 heads and 4 for keys, 16384 words, and a Whisper of 6
layers, 512 wide, on 30-second windows. The first table compares ids and times of `generate(num_beams=...)` and of
transformers' own on the same embeddings of 160-token prompts, which is what the released AVSR code calls, one row at a
time (umbertocappellazzo/Omni-AVSR @7de6be2, modeling_OmniAVSR.py:315-319); both are run in turns, and what is shown are
medians and the range of the middle half, and beside each ratio the one that FLOPs (`mllm/evaluation/flops.py`) predict.
The second tells, for every audio rate, seconds of compute per second of audio, encoder included, and the most memory
above the weights. Decoding is bound by reading the weights and the cache, which FLOPs do not see. Times are CPU time of
the process, or wall time on a GPU.
"""

import argparse
import ctypes
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from outcomes import Outcome, append, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, PreTrainedConfig, WhisperConfig
from turns import in_turns, options, spread, unprepared

from mllm.budget import Budget
from mllm.checkpoints.build import config_of_parts
from mllm.config.medium import AudioConfig, AudioEncoderConfig, VideoConfig
from mllm.config.model import ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.flops import Item, llm_flops, request_cost
from mllm.model.media_arguments import MEDIA_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.synthetic.tokenizer import build_tokenizer

SECONDS = 6
RATES = (1, 2, 4, 8, 16)
FRAMES_PER_SECOND = 50
PREFIX_TOKENS = 160
PREFIX_RATE = 2
GOAL = 2.2
"""The goal of decoding behind the embeddings of a prompt; an encoder adds to both what its size takes."""
GOAL_WITH_ENCODER = 2.0
"""That of a whole request, which is what is felt."""
VOCABULARY = 16384


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float:
    """Measure the most memory a run holds above what is held before it."""
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e3


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def build_model(
    device: torch.device,
    dtype: torch.dtype,
    rates: Sequence[int] = RATES,
    video: tuple[VideoConfig, PreTrainedConfig] | None = None,
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build the model of the head of this file, and its processor.

    Args:
        video: videos and their encoder, where it reads those too.
    """
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
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    encoder = AudioEncoderConfig(source="random")
    medium = AudioConfig(encoder=encoder, budgets=[f"/{rate}" for rate in rates])
    settings = ModelConfig(llm="random", chat_format="plain", audio=medium, video=None if video is None else video[0])
    encoders: dict[str, PreTrainedConfig] = {"audio": audio} | ({} if video is None else {"video": video[1]})
    placeholder_ids = {
        medium: cast(int, tokenizer.convert_tokens_to_ids(PLACEHOLDER_TOKENS[medium])) for medium in encoders
    }
    torch.manual_seed(0)
    model: Any = ElasticForConditionalGeneration(
        config_of_parts(settings, text_config=text, encoder_configs=encoders, placeholder_ids=placeholder_ids)
    )
    extractor = {"feature_size": 80, "feature_extractor_type": "WhisperFeatureExtractor"}
    preprocessors = {"audio": extractor} | ({} if video is None else {"video": {}})
    kept = ProcessorConfig(chat_format="plain", preprocessors=preprocessors)
    processor = ElasticProcessor(tokenizer, model.config, kept)
    return model.to(device=device, dtype=dtype).eval(), processor


def build_batch(processor: ElasticProcessor, num_rows: int, words: int = 1) -> Batch:
    """Make rows of six seconds of random audio and a question of so many words."""
    generator = torch.Generator().manual_seed(1)
    prompt = (Media("audio", "none"), Text(" ".join(["transcribe"] * words)))
    messages = (Message("user", prompt), Message("assistant", (Text("place blue at f two now"),)))
    samples = [Sample(f"row{number}", messages, task="asr") for number in range(num_rows)]
    media = [[LoadedMedia("audio", torch.randn(80, 3000, generator=generator), SECONDS * 16_000)] for _ in samples]
    return processor.batch(samples, media, for_training=False)


def prompts(processor: ElasticProcessor, batch: Batch, rate: int, device: torch.device) -> dict[str, Tensor]:
    """Make the inputs of `generate` at one rate."""
    inputs = processor.expand(batch, [[Budget.parse(f"audio=/{rate}")] * len(batch.rows)], left_padding=True).inputs
    return {key: value.to(device) for key, value in inputs.items()}


def prefix_prompts(processor: ElasticProcessor, num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Make prompts of 160 tokens: 150 soft ones (rate 2), the rest words."""
    for words in range(1, PREFIX_TOKENS):
        inputs = prompts(processor, build_batch(processor, num_rows, words), PREFIX_RATE, device)
        if inputs["input_ids"].shape[1] >= PREFIX_TOKENS:
            return inputs
    raise AssertionError("words are tokens")


@torch.no_grad()
def embed(model: ElasticForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Run encoder and compressor, which both searches run once."""
    return model.model.embed(inputs["input_ids"], {key: inputs.get(key) for key in MEDIA_KEYS})


@torch.no_grad()
def library(model: ElasticForConditionalGeneration, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Run transformers' own search: embeddings made once, the prompt read by every beam."""
    embeds = embed(model, inputs)
    rest = {key: value for key, value in inputs.items() if key not in (*MEDIA_KEYS, "input_ids")}
    ids = inputs["input_ids"].clamp(max=VOCABULARY - 1)
    mixin: Any = GenerationMixin  # its types do not tell that it generates
    return mixin.generate(model, ids, inputs_embeds=embeds, **rest, **options)


def predicted(config: Any, arguments: argparse.Namespace, length: int) -> tuple[float, float]:
    """Compute the ratios of FLOPs of one row, with what both do alike (encoder and compressor), and without."""
    frames = SECONDS * FRAMES_PER_SECOND
    item = Item("audio", frames, frames // PREFIX_RATE)
    ours = request_cost(
        config, [item], num_prompt_tokens=length, num_new_tokens=arguments.new_tokens, num_beams=arguments.beams
    )
    alike = ours.encoder + ours.compressor
    prompt = llm_flops(config.text_config, num_tokens=length, num_logits=1, adapter=config.adapter)
    theirs = alike + arguments.beams * prompt + ours.decode  # every beam reads the whole prompt
    return theirs / ours.total, (theirs - alike) / (ours.total - alike)


def compare(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    arguments: argparse.Namespace,
    device: torch.device,
) -> tuple[Table, list[Outcome]]:
    """Make the first table, and the outcomes for one row, as which the released code decodes.

    Raises:
        SystemExit: ids differ.
    """
    options = {
        "num_beams": arguments.beams,
        "max_new_tokens": arguments.new_tokens,
        "min_new_tokens": arguments.new_tokens,
    }
    options["do_sample"] = False
    table = Table(title=f"{arguments.beams} beams, {arguments.new_tokens} new tokens, {PREFIX_TOKENS}-token prompts")
    columns = ["rows", "ids", "transformers s", "prompt read once s", "encoder of both s", "decoding", "FLOPs"]
    for name in (*columns, "with encoder", "FLOPs", "peak MB", "peak MB read once"):
        table.add_column(name, justify="right")
    outcomes = []
    for rows in arguments.rows:
        inputs = prefix_prompts(processor, rows, device)
        runs = {
            "library": partial(library, model, inputs, options),
            "shared": partial(model.generate, **inputs, **options),
        }
        length = inputs["input_ids"].shape[1]
        expected, answered = (run()[:, length:].tolist() for run in runs.values())
        if expected != answered:
            raise SystemExit("FAILED: the ids differ from those of the library")
        seconds = in_turns(unprepared({**runs, "encoder": partial(embed, model, inputs)}), arguments.repeats, device)
        row_outcomes = outcomes_of(
            seconds, predicted(model.config, arguments, length), f"{arguments.beams} beams, {rows} row"
        )
        ratios = [cell for one in row_outcomes for cell in (f"{one.ratio:.2f}x", f"{one.predicted:.2f}x")]
        peaks = [f"{peak_megabytes(run, device):.0f}" for run in runs.values()]
        table.add_row(str(rows), "equal", *map(spread, seconds.values()), *ratios, *peaks)
        outcomes += row_outcomes if rows == 1 else []
    return table, outcomes


def outcomes_of(seconds: dict[str, list[float]], flops: tuple[float, float], what: str) -> list[Outcome]:
    """Make the outcomes of decoding alone, and with the encoder, which both run alike."""
    encoder = statistics.median(seconds["encoder"])
    plain, shared = ([taken - encoder for taken in seconds[name]] for name in ("library", "shared"))
    against = "generate(num_beams) of transformers, as Omni-AVSR's"
    return [
        timed(what, against, plain, shared, check="ids equal", predicted=flops[1], goal=GOAL),
        timed(
            f"{what}, with encoder",
            against,
            seconds["library"],
            seconds["shared"],
            check="ids equal",
            predicted=flops[0],
            goal=GOAL_WITH_ENCODER,
        ),
    ]


def budgets(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    arguments: argparse.Namespace,
    device: torch.device,
) -> Table:
    """Make the second table."""
    table = Table(title=f"one {SECONDS}-second utterance, {arguments.new_tokens} new tokens, encoder included")
    for name in ("rate", "prompt tokens"):
        table.add_column(name, justify="right")
    for beams in (1, arguments.beams):
        table.add_column(f"real-time factor, {beams} beams", justify="right")
        table.add_column("peak MB", justify="right")
    batch = build_batch(processor, 1)
    runs: dict[str, Callable[[], object]] = {}
    lengths = {}
    for rate in RATES:
        inputs = prompts(processor, batch, rate, device)
        lengths[rate] = inputs["input_ids"].shape[1]
        for beams in (1, arguments.beams):
            options = {
                "num_beams": beams,
                "max_new_tokens": arguments.new_tokens,
                "min_new_tokens": arguments.new_tokens,
            }
            runs[f"/{rate}, {beams}"] = partial(model.generate, **inputs, **options, do_sample=False)
    seconds = in_turns(unprepared(runs), arguments.repeats, device)
    for rate in RATES:
        cells = []
        for beams in (1, arguments.beams):
            name = f"/{rate}, {beams}"
            factors = [one / SECONDS for one in seconds[name]]
            cells += [spread(factors), f"{peak_megabytes(runs[name], device):.0f}"]
        table.add_row(f"/{rate}", str(lengths[rate]), *cells)
    return table


def main() -> None:
    arguments = options(__doc__, 5, rows=[1], beams=15, new_tokens=25, with_device=True)
    device = torch.device(arguments.device)
    model, processor = build_model(device, getattr(torch, arguments.dtype))
    console = Console(width=160)
    table, outcomes = compare(model, processor, arguments, device)
    console.print(table)
    console.print(budgets(model, processor, arguments, device))
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
