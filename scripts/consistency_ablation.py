"""Compares three ways to train on from a finished run: no teacher, one in the step, and a frozen one.

    python scripts/consistency_ablation.py --run runs/demo --corpus runs/demo/corpus [--steps 40] [--out DIR]

Each way trains the same number of optimizer steps on the images of the synthetic corpus with the same data order per
seed, and takes three forward passes per row: `none` three random budgets, `step` the largest as teacher, a random one
and the smallest (`sampler.mode: sandwich`), `frozen` the teacher at the largest and two random budgets. `start` is the
run as it was. Shown are, at each budget, accuracy on the validation questions and the share of answers equal to what
the run said at its largest budget, as means over seeds with the smallest and largest of them.

What is finished is kept in DIR and not run again; seeds come in turn, so that a stopped comparison is still a fair one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.budget import Budget
from mllm.checkpoints.load import load
from mllm.config.run import DataConfig, RunConfig, SamplerConfig
from mllm.data.manifest import read_manifest
from mllm.evaluation.answer_store import AnswerStore
from mllm.evaluation.metrics import vqa_accuracy
from mllm.evaluation.run import evaluate_model
from mllm.inference.answerer import Answerer, Decoding
from mllm.training.run import read_config, train
from mllm.utils.files import write_text_whole
from mllm.utils.markdown import markdown_table

WAYS = {
    "none": SamplerConfig(mode="random", num_budgets=3),
    "step": SamplerConfig(mode="sandwich", num_budgets=3, distill_weight=1.0),
    "frozen": SamplerConfig(mode="random", num_budgets=2, teacher="frozen", distill_weight=1.0),
}
START = "start"
RESULT = "answers.json"
Answers = dict[str, dict[str, tuple[str, float]]]
"""By budget and question: what was said, and how right it is."""


def config_of(arguments: argparse.Namespace, way: str, seed: int, out: Path) -> RunConfig:
    """Make the config of one run: that of the finished one with another sampler, fewer steps and images alone."""
    config = read_config(arguments.run / "settings.yaml")
    data = DataConfig(
        train=[str(arguments.corpus / "images" / "train.jsonl")],
        tokens_per_batch=config.data.tokens_per_batch,
        max_rows=config.data.max_rows,
        num_workers=0,
    )
    schedule = replace(
        config.train,
        out=str(out),
        start_from=str(arguments.run),
        max_steps=arguments.steps,
        learning_rate=config.train.learning_rate / 10,
        warmup_steps=arguments.steps // 10,
        seed=seed,
        progress=False,
        tensorboard=False,
    )
    return replace(config, data=data, sampler=WAYS[way], train=schedule)


def answers_of(run: Path, arguments: argparse.Namespace, folder: Path) -> Answers:
    """Answer the validation questions at all trained budgets, or read what was answered before."""
    if (folder / RESULT).is_file():
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return {budget: {key: (said, right) for key, (said, right) in one.items()} for budget, one in content.items()}
    model, processor = load(run)
    manifest = arguments.corpus / "images" / "validation.jsonl"
    samples = read_manifest(manifest, manifest.parent)[: arguments.questions]
    budgets = [Budget({"image": amount}) for amount in processor.space.media["image"].trained]
    answerer = Answerer(model, processor, Decoding(max_new_tokens=8), batch_size=24)
    evaluate_model(
        answerer, {"validation": samples}, budgets, output=folder, fingerprint={"model": str(run)}, with_plot=False
    )
    answers: Answers = {}
    for line in AnswerStore(folder).read().values():
        right = vqa_accuracy(line["references"], line["hypothesis"])
        answers.setdefault(line["budget"], {})[line["id"]] = (line["hypothesis"], right)
    write_text_whole(folder / RESULT, json.dumps(answers, ensure_ascii=False) + "\n")
    return answers


def table_of(results: dict[str, list[Answers]], budgets: Sequence[str]) -> str:
    """Tabulate accuracy and agreement with the largest budget of the start, by way and budget."""
    (start,) = results[START]
    reference = {key: said for key, (said, _) in start[budgets[0]].items()}
    rows = []
    for way, runs in results.items():
        right = [[statistics.mean(one for _, one in run[budget].values()) for run in runs] for budget in budgets]
        same = [
            [statistics.mean(said == reference[key] for key, (said, _) in run[budget].items()) for run in runs]
            for budget in budgets
        ]
        rows.append([f"{way} ({len(runs)})", *map(_spread, right), *map(_spread, same)])
    head = ["teacher (runs)", *(f"right, {one}" for one in budgets), *(f"as the start, {one}" for one in budgets)]
    return markdown_table(head, rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} - {100 * max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run of the synthetic corpus")
    parser.add_argument("--corpus", type=Path, required=True, help="its corpus")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each way")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("--questions", type=int, default=None, help="validation questions; all when left out")
    parser.add_argument("--out", type=Path, default=Path("runs/consistency"))
    arguments = parser.parse_args()
    console = Console(width=200)
    results: dict[str, list[Answers]] = {START: [answers_of(arguments.run, arguments, arguments.out / START)]}
    budgets = list(results[START][0])
    for seed in range(arguments.seeds):
        for way in WAYS:
            out = arguments.out / f"{way}-{seed}"
            if not (out / "trainables.safetensors").is_file():
                train(config_of(arguments, way, seed, out), resume="auto")
            results.setdefault(way, []).append(answers_of(out, arguments, out / "answers_at_budgets"))
            console.print(f"{way}, seed {seed}: done")
        write_text_whole(arguments.out / "consistency.md", table_of(results, budgets) + "\n")
    console.print(table_of(results, budgets), soft_wrap=True)


if __name__ == "__main__":
    main()
