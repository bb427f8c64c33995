"""Measures on one GPU, in bfloat16, what this project claims of GPUs, and writes docs/performance_gpu.md.

    make bench-gpu                                                # python benchmarks/gpu.py, on CUDA, at most 8 minutes
    python benchmarks/gpu.py --device cpu --small --out page.md   # every way once, in small: figures without a meaning

Parts: a training step at 8 nested budgets in 8 passes, packed with one attention per segment, and packed with flex
attention; greedy decoding with a growing and with a static cache, beside the time in which the memory of this very
device can be read once; a mixture of experts and a loop over experts; the loss of targets by torch and by Liger; eight
questions about an image, one at a time, in one batch, and grouped. Weights are random; sizes are those of Llama-3.2-1B
and CLIP-L/336. Every part compares results before it measures, and stops where they differ: in float32 (of a step on a
small model) to 1e-4, gradients 1e-3 and ids exactly, and where numbers can be compared also in the dtype that is
measured, to 2e-2. Times are wall seconds until the device is done.

A CPU has no backward pass of flex attention, so that way runs forward alone there; Liger runs in Triton's interpreter
(TRITON_INTERPRET=1) or is said to be left out.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grouped_questions
import mixture_adapter
import side_by_side
import torch
from outcomes import Outcome, markdown_of, timed
from rich.console import Console
from side_by_side import Budget, build, words
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaForCausalLM
from turns import in_turns, unprepared

from mllm.config.medium import ImageConfig, ImageEncoderConfig, ImageQueryConfig
from mllm.config.model import LoraConfig, ModelConfig
from mllm.model.precision import keep_in_float32
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.training.fused_loss import FusedTargetLoss
from mllm.training.loss import ChunkedTargetLoss, WeightedTargets
from mllm.training.step import (
    BudgetView,
    fixed_views,
    forward,
    frozen_features,
    make_training_batch,
    num_targets,
    split_by_budget,
    total_loss,
)
from mllm.utils.markdown import markdown_table

PAGE = Path(__file__).parent.parent / "docs" / "performance_gpu.md"
EXACT, EXACT_GRADIENT, ROUNDED = 1e-4, 1e-3, 2e-2
"""How far results may be apart: losses and gradients in float32, and either in the dtype that is measured."""


@dataclass(frozen=True)
class Sizes:
    """Says how large the models of all parts are, and how often is measured."""

    llm: Mapping[str, Any]
    vision: Mapping[str, Any]
    counts: tuple[int, ...]
    words: int
    rows: int
    prompt_tokens: int
    new_tokens: int
    tokens: int
    questions: int
    question_counts: tuple[int, ...]
    bandwidth_bytes: int
    repeats: int


FULL = Sizes(
    llm={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    counts=(256, 144, 64, 36, 16, 8, 4, 2),
    words=32,
    rows=8,
    prompt_tokens=256,
    new_tokens=128,
    tokens=4096,
    questions=8,
    question_counts=(576, 36, 1),
    bandwidth_bytes=2**31,
    repeats=7,
)
SMALL = Sizes(
    llm={
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    counts=(16, 8, 4, 1),
    words=9,
    rows=2,
    prompt_tokens=8,
    new_tokens=6,
    tokens=32,
    questions=2,
    question_counts=(1,),
    bandwidth_bytes=2**20,
    repeats=2,
)


@dataclass(frozen=True)
class Bench:
    """Says where and in what is measured."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    @property
    def small(self) -> "Bench":
        """The same in float32 and in small, where results must be equal."""
        return replace(self, dtype=torch.float32, sizes=SMALL)

    def seconds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Time runs in turns."""
        return in_turns(unprepared(runs), self.sizes.repeats, self.device)


@dataclass(frozen=True)
class Found:
    """What a part found: ratios, lines of absolute figures, and what was left out and why."""

    outcomes: Sequence[Outcome] = ()
    figures: Sequence[tuple[str, str]] = ()
    left_out: Sequence[str] = ()


def check(name: str, difference: float, most: float) -> float:
    """Refuse results that are too far apart.

    Raises:
        SystemExit: they are.
    """
    if not difference <= most:
        raise SystemExit(f"FAILED: {name} differ by {difference:.1e}, more than {most:.0e}")
    return difference


def apart(one: Tensor, two: Tensor) -> float:
    """Measure the relative difference of two tensors."""
    return float((one.float() - two.float()).norm() / one.float().norm().clamp(min=1e-12))


# ---- a step at nested budgets ----


class Step:
    """Holds a model, one batch, and the ways to train on it at all nested budgets."""

    def __init__(self, bench: Bench) -> None:
        sizes = bench.sizes
        image = ImageConfig(
            encoder=ImageEncoderConfig(source="random"),
            compressor=ImageQueryConfig(num_queries=sizes.counts[0]),
            budgets=list(sizes.counts),
        )
        settings = ModelConfig(llm="random", chat_format="plain", image=image, adapter=LoraConfig(rank=16))
        self.bench = bench
        self.model, self.processor = build(settings, {"image": CLIPVisionConfig(**sizes.vision)}, **sizes.llm)
        nn.Module.to(self.model, device=bench.device, dtype=bench.dtype)
        keep_in_float32(weight for weight in self.model.parameters() if weight.requires_grad)
        self.batch = batch_of(self.processor, sizes)
        self.views = fixed_views(self.batch.rows, [Budget.parse(f"image={count}") for count in sizes.counts])

    def run(self, way: str, *, backward: bool = True) -> float:
        """Go forward, and backward, in one way; return the loss."""
        groups = split_by_budget(self.views) if way == "passes" else [self.views]
        features = frozen_features(self.model, self.batch, self.bench.device)
        self.model.zero_grad(set_to_none=True)
        return sum(self._learn(group, features, way, backward) for group in groups)

    def _learn(self, views: Sequence[BudgetView], features: Any, way: str, backward: bool) -> float:
        laid_out = make_training_batch(self.batch, views, self.processor, packed=True)
        targets = num_targets(self.batch.rows)
        vocabulary = self.model.config.get_text_config().vocab_size
        loss_of = ChunkedTargetLoss(laid_out.targets.to(self.bench.device), targets, vocabulary_size=vocabulary)
        with torch.autocast(self.bench.device.type, self.bench.dtype, enabled=self.bench.dtype != torch.float32):
            outputs = forward(
                self.model,
                laid_out,
                loss_of,
                device=self.bench.device,
                features=features,
                packed_attention="flex" if way == "flex" else "sdpa",
            )
            loss = total_loss(outputs, laid_out, config=self.model.config, num_targets=targets).total
        if backward:
            loss.backward()
        return loss.item()

    def compare(self, ways: Sequence[str], most: float, most_gradient: float) -> float:
        """Compare loss and gradients of all ways, of which the first is what others are held to.

        Raises:
            SystemExit: they differ.
        """
        losses, gradients, worst = {}, {}, 0.0
        for way in ways:
            backward = way != "flex" or self.bench.device.type != "cpu"
            with torch.set_grad_enabled(backward):
                losses[way] = self.run(way, backward=backward)
            grads = [weight.grad.flatten().float() for weight in self.model.parameters() if weight.grad is not None]
            gradients[way] = torch.cat(grads) if grads else None
        for way in ways[1:]:
            difference = abs(losses[way] - losses[ways[0]]) / abs(losses[ways[0]])
            worst = max(worst, check(f"losses of {way} and {ways[0]}", difference, most))
            if (gradient := gradients[way]) is not None:
                name = f"gradients of {way} and {ways[0]}"
                worst = max(worst, check(name, apart(gradients[ways[0]], gradient), most_gradient))
        return worst


def batch_of(processor: ElasticProcessor, sizes: Sizes) -> Batch:
    """Make rows of an image, a question and an answer of equal length."""
    pixels = (3, sizes.vision["image_size"], sizes.vision["image_size"])
    images = [torch.randn(pixels, generator=torch.Generator().manual_seed(row)) for row in range(sizes.rows)]
    parts = [[words(sizes.words), LoadedMedia("image", image), words(sizes.words)] for image in images]
    return side_by_side.rows_of(processor, [(part, words(sizes.words)) for part in parts])


def packed_step(bench: Bench) -> Found:
    """Compare and time the step at nested budgets."""
    ways = ("passes", "sdpa", "flex")
    exact = Step(bench.small).compare(ways, EXACT, EXACT_GRADIENT)
    step = Step(bench)
    rounded = step.compare(ways, ROUNDED, ROUNDED)
    on_cpu = bench.device.type == "cpu"
    timed_ways = ways[:2] if on_cpu else ways
    seconds = bench.seconds({way: partial(step.run, way) for way in timed_ways})
    names = {"sdpa": "packed, one attention per segment", "flex": "packed, flex attention"}
    told = f"equal within {exact:.0e} in float32, {rounded:.0e} as measured"
    outcomes = [
        timed(
            f"step at {len(bench.sizes.counts)} nested budgets, {names[way]}",
            "a pass each, encoded once",
            seconds["passes"],
            seconds[way],
            check=told,
        )
        for way in timed_ways[1:]
    ]
    left_out = ["flex attention was run forward alone: it has no backward pass on a CPU"] if on_cpu else []
    figures = [(f"step, {way}", milliseconds(seconds[way])) for way in timed_ways]
    return Found(outcomes, [*figures, *peak_of(bench, {way: partial(step.run, way) for way in timed_ways})], left_out)


def peak_of(bench: Bench, runs: Mapping[str, Callable[[], object]]) -> list[tuple[str, str]]:
    """Measure the most memory that each run holds above what was there; nothing on a CPU."""
    if bench.device.type == "cpu":
        return []
    peaks = []
    for name, run in runs.items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(
            (f"memory above the weights, {name}", f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB")
        )
    return peaks


def milliseconds(seconds: Sequence[float]) -> str:
    """Write the median."""
    return f"{1000 * statistics.median(seconds):.2f} ms"


# ---- decoding ----


def decoding(bench: Bench) -> Found:
    """Compare and time greedy decoding of one row with a growing and with a static cache."""
    small = bench.small
    ids = {way: decode(small, llm_of(small), way, small.sizes.new_tokens) for way in ("growing", "static")}
    check("ids of a growing and a static cache", float((ids["growing"] != ids["static"]).float().mean()), 0.0)
    llm, most = llm_of(bench), bench.sizes.new_tokens
    half = most // 2
    # The prompt and, with a static cache, the capture of the graph are in both lengths, and fall out of the difference.
    runs = {
        (way, length): partial(decode, bench, llm, way, length)
        for way in ("growing", "static")
        for length in (half, most)
    }
    seconds = bench.seconds({f"{way} {length}": run for (way, length), run in runs.items()})
    per_token = {
        way: [(b - a) / (most - half) for a, b in zip(seconds[f"{way} {half}"], seconds[f"{way} {most}"], strict=True)]
        for way in ("growing", "static")
    }
    # The embedding of a token is one row of its table; the head, whose table it shares, is read whole.
    num_bytes = sum(weight.numel() * weight.element_size() for weight in llm.parameters())
    bandwidth = read_bandwidth(bench)
    bound = num_bytes / bandwidth
    figures = [
        (
            "memory read",
            f"{bandwidth / 1e12:.2f} TB/s, measured by a sum over {bench.sizes.bandwidth_bytes / 1e9:.1f} GB",
        ),
        ("weights read per token", f"{num_bytes / 1e9:.2f} GB, so at least {1000 * bound:.3f} ms"),
    ]
    for way, times in per_token.items():
        middle = max(statistics.median(times), 1e-9)
        figures.append(
            (f"token, {way} cache", f"{1000 * middle:.3f} ms, {1 / middle:.0f}/s, {bound / middle:.0%} of the bound")
        )
    if bench.device.type == "cpu":  # a few tokens of a toy are noise, and a ratio of noise is no outcome
        return Found((), figures, ["decoding has no ratio: a CPU compiles no graph, and both ways are one"])
    outcome = timed(
        "a token of greedy decoding, static cache",
        "growing cache, as generate() by default",
        per_token["growing"],
        per_token["static"],
        check="ids equal in float32",
    )
    return Found([outcome], figures)


def llm_of(bench: Bench) -> Any:
    """Make the LLM with random weights, its head the embedding."""
    torch.manual_seed(0)
    config = side_by_side.llm_config(**bench.sizes.llm, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
    llm = LlamaForCausalLM(config).eval()
    return nn.Module.to(llm, device=bench.device, dtype=bench.dtype)


@torch.no_grad()
def decode(bench: Bench, llm: Any, way: str, length: int) -> Tensor:
    """Answer one prompt with so many tokens."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, bench.sizes.llm["vocab_size"], (1, bench.sizes.prompt_tokens), generator=generator)
    options: dict[str, Any] = {"cache_implementation": "static"} if way == "static" else {}
    return llm.generate(
        prompt.to(bench.device), do_sample=False, max_new_tokens=length, min_new_tokens=length, **options
    )


def read_bandwidth(bench: Bench) -> float:
    """Measure bytes per second at which the device's memory is read."""
    values = torch.ones(bench.sizes.bandwidth_bytes // 4, device=bench.device)
    (seconds,) = bench.seconds({"read": values.sum}).values()
    return bench.sizes.bandwidth_bytes / min(seconds)


# ---- mixture of experts, loss, questions ----


def mixture(bench: Bench) -> Found:
    """Compare and time a mixture of experts beside a loop over experts, forward and backward."""
    for dtype, most in ((torch.float32, EXACT), (bench.dtype, ROUNDED)):
        parts = mixture_on(bench, dtype)
        results = []
        for way in (mixture_adapter.loop, nn.Module.__call__):
            mome, hidden, upstream = parts
            mome.zero_grad()
            hidden.grad = None
            out = way(mome, hidden)
            out.backward(upstream)
            assert hidden.grad is not None
            results.append((out.detach(), hidden.grad.clone()))
        worst = max(apart(theirs, ours) for theirs, ours in zip(*results, strict=True))
        check(f"a mixture of experts and a loop in {dtype}", worst, most)
    runs = {way: partial(mixture_adapter.step, way, *parts) for way in ("expert loop", "dense")}
    seconds = bench.seconds(runs)
    outcome = timed(
        f"mixture of experts, forward and backward, {bench.sizes.tokens} tokens",
        "loop over experts, as transformers'",
        seconds["expert loop"],
        seconds["dense"],
        check=f"output and gradient within {worst:.0e}",
    )
    return Found([outcome], [("mixture of experts", milliseconds(seconds["dense"]))])


def mixture_on(bench: Bench, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """Build the adapter of `mixture_adapter.py` on the device."""
    mome, hidden, upstream = mixture_adapter.build(dtype, bench.sizes.tokens)
    placed = hidden.detach().to(bench.device).requires_grad_()
    return mome.to(bench.device), placed, upstream.to(bench.device)


def liger(bench: Bench) -> Found:
    """Compare and time the loss of targets by torch, which makes all logits, and by Liger's kernel."""
    if importlib.util.find_spec("liger_kernel") is None:
        return Found(left_out=["Liger: liger-kernel is not installed (`pip install -e '.[liger]'`)"])
    if bench.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return Found(left_out=["Liger: without a GPU its kernels run with TRITON_INTERPRET=1 alone"])
    compare_losses(bench.small, EXACT)
    worst = compare_losses(bench, ROUNDED)
    runs = losses_of(bench)
    seconds = bench.seconds(runs)
    outcome = timed(
        f"loss of {bench.sizes.tokens} targets, forward and backward, by Liger",
        "by torch",
        seconds["torch"],
        seconds["liger"],
        check=f"loss and gradient within {worst:.0e}",
    )
    return Found([outcome], peak_of(bench, {f"loss by {name}": run for name, run in runs.items()}))


def losses_of(bench: Bench) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Make what computes the loss and its gradient, by torch and by Liger, of the same hidden states."""
    sizes, device = bench.sizes, bench.device
    count, vocabulary = sizes.tokens, sizes.llm["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, sizes.llm["hidden_size"], generator=generator).to(device, bench.dtype).requires_grad_()
    torch.manual_seed(0)
    head = nn.Linear(sizes.llm["hidden_size"], vocabulary, bias=False).to(device, bench.dtype).requires_grad_(False)
    targets = WeightedTargets(
        ids=torch.randint(vocabulary, (count,), generator=generator),
        weights=torch.rand(count, generator=generator),
        budgets=torch.zeros(count, dtype=torch.int64),
        teachers=torch.arange(count),
        num_budgets=1,
    ).to(device)
    ways = {
        "torch": ChunkedTargetLoss(targets, count, vocabulary_size=vocabulary),
        "liger": FusedTargetLoss(targets, count, head),
    }

    def run(way: str) -> tuple[Tensor, Tensor]:
        states.grad = None
        loss, _ = ways[way](head, states)
        loss.backward()
        assert states.grad is not None
        return loss.detach(), states.grad

    return {way: partial(run, way) for way in ways}


def compare_losses(bench: Bench, most: float) -> float:
    """Compare loss and gradient of the two ways."""
    runs = losses_of(bench)
    theirs = [value.clone() for value in runs["torch"]()]
    ours = [value.clone() for value in runs["liger"]()]
    return check("losses or gradients of torch and Liger", max(map(apart, theirs, ours)), most)


def questions(bench: Bench) -> Found:
    """Compare and time several questions about one image."""
    sizes, outcomes = bench.sizes, []
    for count in sizes.question_counts:
        answers = {name: run() for name, run in ways_to_ask(replace(bench, dtype=torch.float32), count).items()}
        wrong = sum(ids != answers["grouped"] for ids in answers.values())
        check(f"answers at {count} tokens in float32", float(wrong), 0.0)
        seconds = bench.seconds(ways_to_ask(bench, count))
        outcomes += [
            timed(
                f"{sizes.questions} questions about an image, {count} tokens, grouped",
                name,
                seconds[name],
                seconds["grouped"],
                check="ids equal in float32",
            )
            for name in ("one at a time", "one batch")
        ]
    return Found(outcomes)


def ways_to_ask(bench: Bench, count: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Make the ways of `grouped_questions.py` on a model of these sizes."""
    sizes = bench.sizes
    image = ImageConfig(encoder=ImageEncoderConfig(source="random"), budgets=[count])
    model, processor = grouped_questions.build_model(
        bench.device, bench.dtype, image, vision_sizes=sizes.vision, text_sizes=sizes.llm
    )
    return grouped_questions.runs_of(model, processor, count, Namespace(questions=sizes.questions, new_tokens=4))


PARTS: dict[str, Callable[[Bench], Found]] = {
    "packed step": packed_step,
    "decoding": decoding,
    "mixture of experts": mixture,
    "Liger": liger,
    "questions": questions,
}


def page_of(bench: Bench, found: Sequence[Found], left_out: Sequence[str]) -> str:
    """Write the page."""
    on_cpu = bench.device.type == "cpu"
    name = platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name(bench.device)
    rows = [figure for one in found for figure in one.figures]
    missing = [*(reason for one in found for reason in one.left_out), *left_out]
    small = " Sizes are toys, which tell that every way runs and nothing of speed." if bench.sizes is SMALL else ""
    lines = [
        "# Speed on a GPU\n",
        f"Written by `make bench-gpu` (`benchmarks/gpu.py`, which says what is compared) on {name} with torch "
        f"{torch.__version__}, in {str(bench.dtype).removeprefix('torch.')}.{small}\n",
        markdown_of([outcome for one in found for outcome in one.outcomes]),
        markdown_table(("figure", "value"), rows, of_numbers=False) + "\n",
        *(f"- Left out: {reason}." for reason in missing),
    ]
    return "\n".join(lines) + "\n"


def read_arguments() -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: CUDA without a GPU, or a CPU that would write the page of the docs.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes, to see that every way runs")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after so many")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small --out page.md runs every way once in small")
    if arguments.device == "cpu" and arguments.out == PAGE:
        parser.error("figures of a CPU do not go into docs/performance_gpu.md; name another page by --out")
    return arguments


def measure(bench: Bench, parts: Sequence[str], *, minutes: float, console: Console) -> str:
    """Compare and measure the parts, none of which begins after so many minutes; return the page."""
    started = time.perf_counter()
    found: list[Found] = []
    late: list[str] = []
    # A CPU would compile flex attention for a minute, and nothing is told of its speed.
    with torch.compiler.set_stance("force_eager" if bench.device.type == "cpu" else "default"):
        for name in parts:
            if time.perf_counter() - started > 60 * minutes:
                late.append(f"{name}: {minutes:g} minutes were over")
                continue
            console.print(f"{time.perf_counter() - started:.0f} s  {name}")
            found.append(PARTS[name](bench))
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    return page_of(bench, found, late)


def main() -> None:
    """Compare, measure, and write the page."""
    arguments = read_arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(torch.device(arguments.device), torch.bfloat16, SMALL if arguments.small else FULL)
    console = Console(width=160)
    page = measure(bench, arguments.only, minutes=arguments.minutes, console=console)
    arguments.out.write_text(page, encoding="utf-8")
    console.print(page, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
