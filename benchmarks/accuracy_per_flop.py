"""Measures what a training step buys: accuracy at equal training FLOPs of four ways to train eight nested budgets.

    python benchmarks/accuracy_per_flop.py [--corpus runs/demo/corpus/images] [--seeds 3] [--out runs/accuracy_per_flop]

All train the same model from the same start on the same rows: the frozen encoder and LLM of the synthetic corpus,
Matryoshka queries that begin as a pyramid and are fitted to captions, and a LoRA; images with two questions each.

    packed    every step trains all eight budgets, in one pass that holds what they share once
    few rows  the same with a quarter of the rows, so that a step costs about what one of `random` does
    random    every step trains one budget, chosen at random, as MQT-LLaVA does (gordonhu608/MQT-LLaVA @92c35d0)
    separate  every step trains all eight budgets in a pass each, as M3's loop does (mu-cai/matryoshka-mm @ec30cd3)

A run ends when its FLOPs are spent, and its learning rate (warm-up, then cosine) is a function of the part that is
spent. `separate` has the gradients of `packed`, which is checked first; it is computed like it and counted as what it
stands for. FLOPs are those of `mllm/evaluation/flops.py`: encoder once per image and step in all ways (M3's own
code runs it again for each scale), frozen LLM with LoRA forward and backward (2), compressor with its gradients (3).

Accuracy is the share of the validation questions whose whole answer, its end included, is what greedy decoding says at
a budget: every token is the likeliest behind the right ones before it. What is finished is kept in DIR, and `--seeds`,
`--levels` and the ways can be extended later.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from side_by_side import CPU, check_equal, packed_llm_flops
from torch import Tensor

from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler
from mllm.checkpoints.build import build
from mllm.config.medium import ImageConfig, ImageEncoderConfig, ImageQueryConfig
from mllm.config.model import LoraConfig, ModelConfig
from mllm.data.manifest import Sample, read_manifest
from mllm.evaluation.flops import Item, compressor_flops, encoder_flops, llm_flops
from mllm.model.encoding import encode_media
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.model.trainables import set_trainables
from mllm.packing.attention import enable_packing
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.synthetic.images.corpus import write_image_corpus
from mllm.training.initialization.projector_fit import fit_projectors
from mllm.training.loss import ChunkedTargetLoss
from mllm.training.optimization import named_groups
from mllm.training.step import (
    BudgetView,
    TrainingBatch,
    expand_views,
    fixed_views,
    forward,
    num_targets,
    pack_views,
    sampled_views,
    split_by_budget,
    total_loss,
)
from mllm.utils.markdown import markdown_table

COUNTS = (64, 48, 32, 16, 8, 4, 2, 1)
BUDGETS = tuple(Budget.parse(f"image={count}") for count in COUNTS)
ROWS = {"packed": 12, "few rows": 3, "random": 12, "separate": 12}
"""Rows of a step, by way."""
WAYS = tuple(ROWS)
QUESTIONS = 2
LEARNING_RATE, QUERY_LEARNING_RATE, WARMUP = 1e-3, 1e-4, 0.1
RESULTS = "runs.jsonl"
STYLES = {
    "packed": ("tab:blue", "o"),
    "few rows": ("tab:cyan", "v"),
    "random": ("tab:orange", "s"),
    "separate": ("tab:green", "^"),
}


@dataclass(frozen=True)
class Outcome:
    """What one run came to. `accuracies` are by budget, from the largest down; `spent` are training FLOPs."""

    way: str
    seed: int
    limit: float
    learning_rate: float
    spent: float
    steps: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over budgets."""
        return statistics.mean(self.accuracies)


class Pool:
    """Holds samples of one image each, every image loaded and encoded once, and makes training batches of them."""

    def __init__(
        self, samples: Sequence[Sample], model: ElasticForConditionalGeneration, processor: ElasticProcessor
    ) -> None:
        self.samples, self.processor = samples, processor
        self.media: dict[Hashable, LoadedMedia] = {}
        self.features: dict[Hashable, Tensor] = {}
        for sample in samples:
            if sample.media_key not in self.media:
                (self.media[sample.media_key],) = processor.load_media(sample)
        keys = list(self.media)
        for part in parts_of(keys, 100):
            pixels = torch.stack([self.media[key].values for key in part])
            encoded = encode_media(model, {"pixel_values": pixels}, CPU)["image"].values
            self.features |= dict(zip(part, encoded, strict=True))

    def batch(self, samples: Sequence[Sample]) -> tuple[Batch, dict[str, Features]]:
        """Make a batch, and the features of its images."""
        media = [[self.media[sample.media_key]] for sample in samples]
        batch = self.processor.batch(samples, media, for_training=True)
        values = torch.stack([self.features[key] for key in dict.fromkeys(sample.media_key for sample in samples)])
        return batch, {"image": Features(values, torch.full((len(values),), values.shape[1]))}


def parts_of(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cut a sequence into parts of at most so many."""
    return (items[start : start + size] for start in range(0, len(items), size))


def model_config(seed: int) -> ModelConfig:
    """Configure the model that all ways train."""
    image = ImageConfig(
        encoder=ImageEncoderConfig(source="synthetic:vision", feature_layer=-1),
        compressor=ImageQueryConfig(num_queries=COUNTS[0], start="pyramid"),
        budgets=list(COUNTS),
        span=["<image>", "</image>"],
    )
    lora = LoraConfig(rank=16, alpha=32.0, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    return ModelConfig(llm="synthetic:llm", chat_format="plain", image=image, adapter=lora, seed=seed)


def short_dialogues(samples: Sequence[Sample]) -> list[Sample]:
    """Cut dialogues about an image into rows of `QUESTIONS` questions, each of which shows the image."""
    rows = []
    for sample in samples:
        image = sample.messages[0].parts[0]
        for number, turns in enumerate(parts_of(sample.messages, 2 * QUESTIONS)):
            first = turns[0] if number == 0 else replace(turns[0], parts=(image, *turns[0].parts))
            rows.append(replace(sample, id=f"{sample.id}-{number}", messages=(first, *turns[1:])))
    return rows


def views_of(way: str, batch: Batch, sampler: BudgetSampler, step: int) -> list[BudgetView]:
    """List which rows a step trains at which budgets."""
    return sampled_views(batch.rows, sampler, step) if way == "random" else fixed_views(batch.rows, BUDGETS)


def training_flops(
    model: ElasticForConditionalGeneration, batch: Batch, views: Sequence[BudgetView], laid_out: TrainingBatch, way: str
) -> float:
    """Count the FLOPs of a step as its way would take them; see the head of this file."""
    config, rows = model.config, batch.rows
    block, text, encoder = config.media["image"], config.text_config, config.encoder_configs["image"]
    num_features = rows[0].spans[0].extent.length
    counts = [int(view.budget.amounts["image"].value) for view in views]
    if way in ("packed", "few rows"):
        assert laid_out.plan is not None
        llm = packed_llm_flops(config, laid_out.plan, num_logits=len(laid_out.positions))
        compressed = [COUNTS[0]] * len(rows)
    else:
        lengths = [len(rows[view.row].ids) - 1 + count for view, count in zip(views, counts, strict=True)]
        llm = sum(llm_flops(text, num_tokens=length, adapter=config.adapter) for length in lengths)
        llm += llm_flops(text, num_tokens=0, num_logits=len(laid_out.positions))
        compressed = counts
    # In training nothing is folded, and keys that are never folded cost what position keys cost unfolded.
    unfolded = replace(block, compressor=replace(block.compressor, keys="content", start="released"))
    sizes = {"in_size": encoder.hidden_size, "out_size": text.hidden_size}
    compressor = sum(compressor_flops(unfolded, Item("image", num_features, count), **sizes) for count in compressed)
    images = len({span.item for row in rows for span in row.spans})
    encoding = images * encoder_flops(encoder, Item("image", num_features, 1), block.encoder)
    return encoding + 3 * compressor + 2 * llm


class Study:
    """Trains one model anew in each way from the same start, and answers questions with it.

    Args:
        corpus: folder of `write_image_corpus`.
        seed: of the initial values, the order of rows and the sampled budgets.
        num_questions: of validation.
    """

    def __init__(self, corpus: Path, seed: int, num_questions: int | None = None) -> None:
        self.seed = seed
        self.model, self.processor = build(model_config(seed))
        set_trainables(self.model)
        enable_packing(self.model.model.language_model)
        train, captions, asked = (
            read_manifest(corpus / f"{name}.jsonl", corpus) for name in ("train", "captions", "validation")
        )
        self.rows = short_dialogues(train)
        self.questions = asked[:num_questions]
        self.pool = Pool([*self.rows, *self.questions], self.model, self.processor)
        described = [{"batch": self.pool.batch(part)[0]} for part in parts_of(captions, 100)]
        fit_projectors(self.model, self.processor, cast(Any, described), num_counted=len(described))
        self.start = {name: value.clone() for name, value in self.trainables()}

    def trainables(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what trains, by name."""
        return ((name, value.data) for name, value in self.model.named_parameters() if value.requires_grad)

    def steps_of(self, way: str) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        """Yield for ever the FLOPs of a step, and what computes its loss."""
        sampler = BudgetSampler(self.processor.space, "random", seed=self.seed)
        step = 0
        for epoch in range(1_000_000):
            order = random.Random(f"{self.seed}:{epoch}").sample(self.rows, len(self.rows))
            for rows in parts_of(order, ROWS[way]):
                batch, features = self.pool.batch(rows)
                views = views_of(way, batch, sampler, step)
                laid_out = self.lay_out(batch, views)
                flops = training_flops(self.model, batch, views, laid_out, way)
                targets = num_targets(batch.rows)
                yield flops, lambda of=laid_out, targets=targets, features=features: self.loss(of, targets, features)
                step += 1

    def lay_out(self, batch: Batch, views: Sequence[BudgetView]) -> TrainingBatch:
        """Pack views of a batch."""
        return pack_views(expand_views(batch, views, self.processor), views, self.processor, packed=True)

    def loss(self, laid_out: TrainingBatch, targets: int, features: dict[str, Features]) -> Tensor:
        """Compute the loss of a step."""
        text = self.model.config.get_text_config()
        target_loss = ChunkedTargetLoss(laid_out.targets, targets, vocabulary_size=text.vocab_size)
        outputs = forward(self.model, laid_out, target_loss, device=CPU, features=features)
        return total_loss(outputs, laid_out, config=self.model.config, num_targets=targets).total

    def check_separate(self) -> float:
        """Measure how far gradients of a packed step are from those of a pass per budget, in float64.

        In float32 those of queries, whose attention is sharp at the start, are rounded by 2e-5 in either way.

        Raises:
            SystemExit: further than 1e-5.
        """
        batch, features = self.pool.batch(self.rows[: ROWS["packed"]])
        views, targets = fixed_views(batch.rows, BUDGETS), num_targets(batch.rows)
        precise = {medium: replace(one, values=one.values.double()) for medium, one in features.items()}

        def learn(groups: Sequence[Sequence[BudgetView]]) -> float:
            losses = [self.loss(self.lay_out(batch, group), targets, precise) for group in groups]
            torch.stack(losses).sum().backward()
            return sum(loss.item() for loss in losses)

        self.model.double()
        runs = {"separate": lambda: learn(split_by_budget(views)), "packed": lambda: learn([views])}
        worst = check_equal(self.model, runs)
        self.model.float()
        return worst

    def run(self, way: str, limit: float, learning_rate: float) -> Outcome:
        """Train from the start until the FLOPs are spent, then answer all questions at all budgets."""
        with torch.no_grad():
            for name, value in self.trainables():
                value.copy_(self.start[name])
        self.model.train()
        rates = {"compressors": QUERY_LEARNING_RATE * learning_rate / LEARNING_RATE}
        groups = named_groups(self.model, learning_rate=learning_rate, part_learning_rates=rates, weight_decay=0.0)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        peaks = [group["lr"] for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        spent, steps = 0.0, 0
        for flops, loss_of in self.steps_of(way):
            if spent + flops > limit:
                break
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule((spent + flops / 2) / limit)
            optimizer.zero_grad(set_to_none=True)
            loss_of().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            spent, steps = spent + flops, steps + 1
        return Outcome(way, self.seed, limit, learning_rate, spent, steps, self.accuracies())

    @torch.no_grad()
    def accuracies(self) -> tuple[float, ...]:
        """Measure at each budget the share of questions whose whole answer greedy decoding would say."""
        self.model.eval()
        right = torch.zeros(len(BUDGETS))
        for part in parts_of(self.questions, 50):
            batch, features = self.pool.batch(part)
            views = fixed_views(batch.rows, BUDGETS)
            laid_out = self.lay_out(batch, views)
            likeliest = Likeliest(laid_out.targets.ids)
            forward(self.model, laid_out, likeliest, device=CPU, features=features)
            views_of_targets = torch.bucketize(torch.arange(len(likeliest.right)), laid_out.starts, right=True) - 1
            wrong = torch.zeros(len(views)).index_add(0, views_of_targets, (~likeliest.right).float())
            right += (wrong == 0).float().view(len(part), len(BUDGETS)).sum(0)
        return tuple((right / len(self.questions)).tolist())


class Likeliest:
    """Notes in place of a loss which targets are the likeliest tokens; a `TargetLoss`."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.right = ids, torch.zeros(len(ids), dtype=torch.bool)

    def __call__(self, head: Callable[[Tensor], Tensor], hidden_PH: Tensor) -> tuple[Tensor, Tensor]:
        self.right = head(hidden_PH).argmax(-1) == self.ids
        return hidden_PH.new_zeros(()), hidden_PH.new_zeros(len(BUDGETS))


def schedule(part: float) -> float:
    """Return the part of the peak learning rate when a part of all FLOPs is spent."""
    if part < WARMUP:
        return part / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (part - WARMUP) / (1 - WARMUP)))


def table_of(outcomes: Sequence[Outcome]) -> str:
    """Tabulate accuracies by FLOPs and way: means over seeds, with the smallest and the largest."""
    rows = []
    for limit in sorted({outcome.limit for outcome in outcomes}):
        for way in WAYS:
            runs = [one for one in outcomes if one.limit == limit and one.way == way]
            if not runs:
                continue
            by_budget = zip(*(run.accuracies for run in runs), strict=True)
            steps = f"{statistics.mean(run.steps for run in runs):.0f}"
            cells = [_spread([run.mean for run in runs]), *map(_spread, by_budget)]
            rows.append([f"{limit / 1e12:.2f}", way, str(len(runs)), steps, *cells])
    head = ["TFLOP", "way", "seeds", "steps", "mean", *(str(count) for count in COUNTS)]
    return markdown_table(head, rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the mean accuracy and those of four budgets over FLOPs, a line per way and a point per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"mean of 8 budgets": None, **{f"image={count}": COUNTS.index(count) for count in (64, 16, 4, 1)}}
    for axis, (title, index) in zip(figure.subplots(1, len(panels), sharex=True), panels.items(), strict=True):
        for way in WAYS:
            points: dict[float, list[float]] = {}
            for run in (one for one in outcomes if one.way == way):
                value = run.mean if index is None else run.accuracies[index]
                points.setdefault(run.limit / 1e12, []).append(100 * value)
            color, marker = STYLES[way]
            limits = sorted(points)
            axis.plot(limits, [statistics.mean(points[limit]) for limit in limits], color=color, label=way)
            for limit in limits:
                axis.plot([limit] * len(points[limit]), points[limit], marker, color=color, markersize=4, alpha=0.5)
        axis.set(title=title, xlabel="training TFLOP")
    figure.axes[0].set_ylabel("accuracy %")
    figure.axes[0].legend()
    figure.savefig(path)


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what is finished; an empty list where nothing is."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Outcome(**{**json.loads(line), "accuracies": tuple(json.loads(line)["accuracies"])}) for line in lines]


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of an image corpus; one is made in DIR when left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways to train")
    parser.add_argument("--tflops", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="training TFLOP of the runs")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="peak, of the LoRA")
    parser.add_argument("--questions", type=int, help="validation questions; all when left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy_per_flop"), metavar="DIR")
    return parser.parse_args()


def main() -> None:
    """Run what is not finished, and write the table and the plot of all."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, results = Console(width=200), arguments.out / RESULTS
    corpus = arguments.corpus or arguments.out / "corpus"
    if not (corpus / "validation.jsonl").exists():
        write_image_corpus(corpus, num_train=1500, num_validation=100, num_test=1)
    done = {(one.way, one.seed, one.limit, one.learning_rate) for one in read_outcomes(results)}
    for seed in arguments.seeds:
        limits = sorted(1e12 * tflops for tflops in arguments.tflops)
        keys = [(way, seed, limit, arguments.learning_rate) for limit in limits for way in arguments.ways]
        if not (missing := [key for key in keys if key not in done]):
            continue
        study = Study(corpus, seed, arguments.questions)
        console.print(f"seed {seed}: packed and separate gradients equal within {study.check_separate():.0e}")
        for way, _, limit, rate in missing:
            outcome = study.run(way, limit, rate)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            console.print(f"{way}, seed {seed}, {limit / 1e12:g} TFLOP: {outcome.steps} steps, {outcome.mean:.1%}")
    chosen = [one for one in read_outcomes(results) if one.learning_rate == arguments.learning_rate]
    (arguments.out / "table.md").write_text(table_of(chosen) + "\n", encoding="utf-8")
    plot(chosen, arguments.out / "accuracy_per_flop.png")
    console.print(table_of(chosen), soft_wrap=True)


if __name__ == "__main__":
    main()
