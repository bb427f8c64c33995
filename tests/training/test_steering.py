"""A run says what it answers, keeps its best, ends when it no longer improves, and can be tried before it starts."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from free_ports import free_port
from launches import CONFIGS, run_launcher
from safetensors.torch import load_file

from mllm.checkpoints.load import TRAINABLES, load
from mllm.cli import main
from mllm.config.evaluation import EvaluationConfig
from mllm.config.run import RunConfig, read_run_config
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.run import evaluate
from mllm.evaluation.run_report import curves, write_report
from mllm.evaluation.validation_answers import spread
from mllm.training.arguments import check_reports
from mllm.training.dry_run import dry_run
from mllm.training.logs import validation_line
from mllm.training.memory import memory_of, shown_bytes
from mllm.training.pipeline.batches import RankBatches
from mllm.training.selection import Selection
from mllm.utils.run_paths import BEST, LOG, VALIDATION_ANSWERS

BUDGETS = ["image=64,audio=/4", "image=1,audio=/8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and a manifest of images with questions and of speech."""
    folder = tmp_path_factory.mktemp("steering")
    parts = tiny.write_parts(folder / "parts")
    samples = []
    for seed in range(4):
        names = tiny.write_media(folder / "media", seed=seed)
        for medium, task, question, answer in (
            ("image", "vqa", "what is it?", "red"),
            ("audio", "asr", "transcribe speech to text.", "place red now"),
        ):
            content = (Media(medium, f"media/{names[medium]}"), Text(question))  # type: ignore[arg-type]
            messages = (Message("user", content), Message("assistant", (Text(answer),)))
            samples.append(Sample(f"{medium}{seed}", messages, task=task))
    write_manifest(folder / "train.jsonl", samples)
    (folder / "parts.json").write_text(json.dumps(parts))
    return folder


def values_of(world: Path, name: str, **train: Any) -> dict[str, Any]:
    """A run config of the tiny parts."""
    parts = json.loads((world / "parts.json").read_text())
    media = {
        medium: {"encoder": parts[medium], **{key: tiny.MEDIA[medium][key] for key in ("compressor", "budgets")}}
        for medium in ("image", "audio")
    }
    return {
        "model": {"llm": parts["llm"], "chat_format": "plain", "adapter": {"rank": 4, "alpha": 8}, **media},
        "data": {
            "train": [str(world / "train.jsonl")],
            "validation": [str(world / "train.jsonl")],
            "num_workers": 0,
            "max_rows": 3,
        },
        "sampler": {"mode": "points", "points": BUDGETS},
        "train": {
            "out": str(world / name),
            "max_steps": 6,
            "validate_every": 2,
            "save_every": 2,
            "keep_checkpoints": 9,
            "log_every": 2,
            "use_cpu": True,
            "progress": False,
            "tensorboard": False,
            **train,
        },
    }


def train_in(world: Path, name: str, *words: str, **train: Any) -> tuple[int, Path]:
    """Run `mllm train`; returns its exit code and the run folder."""
    (world / f"{name}.yaml").write_text(yaml.safe_dump(values_of(world, name, **train)))
    return main(["train", "--config", str(world / f"{name}.yaml"), *words]), world / name


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A run that answers all of its validation samples and keeps the step of the lowest loss at one budget."""
    code, folder = train_in(
        world, "run", answered_samples=8, answer_tokens=6, best_metric="loss/image=1,audio=/8", learning_rate=0.02
    )
    assert code == 0
    return folder


def validations(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row]


def test_answers_during_training_are_scored_as_an_evaluation_scores_them(world: Path, run: Path) -> None:
    last = validations(run)[-1]
    assert [row["step"] for row in validations(run)] == [2, 4, 6]
    settings = EvaluationConfig(
        model=str(run), manifest=[str(world / "train.jsonl")], budgets=";".join(BUDGETS), max_new_tokens=6, use_cpu=True
    )
    results = evaluate(settings)
    assert results is not None
    measured = {f"eval_{row['metric']}/{row['task']}/{row['budget']}": row["value"] for row in results.rows}
    assert len(measured) == 4
    assert {name: value for name, value in last.items() if name.count("/") >= 2 and "loss" not in name} == measured
    words = [measured["eval_wer/asr/audio=/4"], measured["eval_wer/asr/audio=/8"]]
    assert last["eval_wer"] == pytest.approx(sum(words) / 2)
    answers = [json.loads(line) for line in (run / VALIDATION_ANSWERS).read_text().splitlines()]
    assert len(answers) == 16
    kept = [json.loads(line) for line in (run / "evaluation" / "hypotheses.jsonl").read_text().splitlines()]
    hypotheses = {(line["id"], line["budget"]): line["hypothesis"] for line in kept}
    assert {(line["id"], line["budget"]): line["hypothesis"] for line in answers} == hypotheses


def test_the_best_of_a_run_is_the_model_of_its_best_validation(run: Path) -> None:
    best = min(validations(run), key=lambda row: row["eval_loss/image=1,audio=/8"])
    kept = load_file(run / BEST / TRAINABLES)
    at_that_step = load_file(run / f"checkpoint-{int(best['step']):08d}" / TRAINABLES)
    assert kept.keys() == at_that_step.keys()
    assert all(torch.equal(value, at_that_step[name]) for name, value in kept.items())
    model, _ = load(run / BEST, device="cpu")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(value, loaded[name]) for name, value in kept.items())


def test_a_run_that_no_longer_improves_ends_early_and_is_whole(world: Path) -> None:
    code, folder = train_in(
        world, "idle", answered_samples=2, answer_tokens=2, best_metric="accuracy", early_stopping=1, max_steps=8
    )
    assert code == 0
    assert [row["step"] for row in validations(folder)] == [2, 4]  # random answers are never right
    assert load(folder, device="cpu")[0].config.model_type == "elastic"
    assert sorted(path.name for path in folder.glob("checkpoint-*"))[-1] == "checkpoint-00000004"


@pytest.mark.slow
def test_two_processes_under_zero2_validate_answer_and_keep_their_best_as_one(world: Path) -> None:
    """Each answers half of the samples, and neither has the moments of all that trains."""
    given: dict[str, Any] = {"answered_samples": 8, "answer_tokens": 6, "best_metric": "loss", "max_steps": 4}
    code, alone = train_in(world, "alone", accumulation=2, learning_rate=0.02, **given)
    assert code == 0
    (world / "pair.yaml").write_text(yaml.safe_dump(values_of(world, "pair", learning_rate=0.02, **given)))
    port = ("--main_process_port", str(free_port()))
    launcher = ("accelerate", "launch", *port, "--config_file", CONFIGS / "accelerate_zero2.yaml")
    run_launcher(*launcher, "-m", "mllm", "train", "--config", world / "pair.yaml", timeout=600)
    pair = world / "pair"
    assert [row["step"] for row in validations(pair)] == [2, 4]
    for expected, row in zip(validations(alone), validations(pair), strict=True):
        figures = [{key: value for key, value in of.items() if key.startswith("eval_")} for of in (expected, row)]
        assert len(figures[0]) == 9  # three losses; accuracy and word error rate, each of two budgets and their mean
        assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    answers = [sorted((run / VALIDATION_ANSWERS).read_text().splitlines()) for run in (alone, pair)]
    assert answers[0] == answers[1]
    best = [load_file(run / BEST / TRAINABLES) for run in (alone, pair)]
    for name, value in best[0].items():
        torch.testing.assert_close(best[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_report_is_one_file_with_curves_tables_and_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--samples", "3"]) == 0
    page = (run / "report.html").read_text()
    assert "written to" in capsys.readouterr().out
    assert page.count("<svg") == 1
    assert not re.search(r'(?:src|href)="https?:', page)
    assert "<script" not in page
    for word in ("eval_wer asr/audio=/8", "loss audio=/4", "<th>audio=/8</th>", "best_metric: loss/image=1,audio=/8"):
        assert word in page
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    assert curves(rows)["loss"]["audio=/4"] == [(row["step"], row["loss/audio=/4"]) for row in rows if "loss" in row]
    assert main(["report", str(run.parent)]) == 2
    assert f"holds no {LOG}" in capsys.readouterr().err


def test_what_was_answered_is_text_in_a_report(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "loss": 2.0}\n')
    answer = {"id": "a", "task": "vqa", "budget": "image=1", "references": ["<b>"], "hypothesis": "<script>x</script>"}
    (tmp_path / VALIDATION_ANSWERS).write_text(json.dumps(answer) + "\n")
    write_report(tmp_path, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "<script" not in page


def test_a_dry_run_shows_what_a_run_takes_and_leaves_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train_in(world, "tried", "--dry_run")
    assert code == 0
    assert not folder.exists()
    shown = capsys.readouterr().out
    for word in ("one micro-batch of 3 rows", "image=64", "audio=/8", "memory whatever the batch:", "6 of them"):
        assert word in shown
    found = dry_run(values_of(world, "tried"))
    by_budget = {cost.budget: cost for cost in found.costs}
    large, small = by_budget[BUDGETS[0]], by_budget[BUDGETS[1]]
    assert large.num_soft_tokens > small.num_soft_tokens
    assert large.activation_bytes > small.activation_bytes > 0
    assert all(math.isfinite(cost.loss) and cost.seconds > 0 for cost in found.costs)
    assert main(["train", "--config", str(world / "tried.yaml"), "--dry_run", "--resume", "auto"]) == 2
    assert "leave out --resume" in capsys.readouterr().err


def test_memory_counts_every_weight_once_and_moments_of_what_trains() -> None:
    layer, frozen = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, dtype=torch.bfloat16)
    frozen.requires_grad_(False)
    model = torch.nn.ModuleList([layer, layer, frozen])  # one layer twice, as tied weights are
    memory = memory_of(model)
    assert (memory.weights, memory.gradients, memory.moments) == (16 * 4 + 10 * 2, 16 * 4, 16 * 8)
    assert shown_bytes(2_340_000_000) == "2.34 GB"


def test_overfitting_repeats_the_first_batches_of_a_run(world: Path) -> None:
    lengths = [10, 20, 30, 40, 50, 60]
    whole = list(itertools.islice(RankBatches(lengths, max_tokens=60, seed=3), 2))
    again = list(itertools.islice(RankBatches(lengths, max_tokens=60, seed=3, num_repeated=2), 6))
    assert again == whole * 3
    code, folder = train_in(world, "overfit", "--overfit", "1", validate_every=None, learning_rate=0.02)
    assert code == 0
    rows = [row for line in (folder / LOG).read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert len({row["soft_tokens_per_step"] for row in rows}) == 1
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "overfit_batches: 1" in (folder / "settings.yaml").read_text()


def test_a_selection_finds_the_best_and_counts_what_came_after() -> None:
    history = [{"step": 1, "loss": 3.0}, *({"step": step, "eval_loss": loss} for step, loss in ((2, 2.0), (4, 1.0)))]
    lowest = Selection.of("loss", patience=2)
    assert lowest.standing(history).is_best
    later = [*history, {"step": 6, "eval_loss": 1.0}, {"step": 8, "eval_loss": math.nan}]
    standing = lowest.standing(later)
    assert (standing.best, standing.best_step, standing.num_since) == (1.0, 4, 2)  # of equal ones the first
    assert lowest.is_over(standing)
    assert not lowest.is_over(lowest.standing(later[:-1]))
    assert Selection.of("loss", best_is="highest").standing(history).best_step == 2
    assert Selection.of("accuracy/vqa/image=16").goal == "highest"
    with pytest.raises(ValueError, match=r"train\.best_metric is 'wer'; the validation has loss"):
        Selection.of("wer").standing(history)
    with pytest.raises(ValueError, match=r"'bleu'; .*train\.best_is: lowest or highest"):
        Selection.of("bleu")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"early_stopping": 2}, "train.early_stopping waits for train.best_metric"),
        ({"best_is": "lowest"}, "train.best_is is lowest, but there is no train.best_metric"),
        ({"overfit_batches": 0}, "train.overfit_batches is 0; it must be at least 1"),
        ({"overfit_batches": 2, "max_steps": None, "epochs": 1}, "train.overfit_batches goes with train.max_steps"),
        ({"report_to": ["aim"]}, r"train\.report_to"),
    ],
)
def test_what_contradicts_itself_is_refused(world: Path, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run_config(values_of(world, "never", **train))


def test_figures_of_a_validation_need_one() -> None:
    values = {"model": {"llm": "x", "adapter": {"rank": 4}}, "data": {"train": ["a.jsonl"]}}
    for key, value in (("answered_samples", 3), ("best_metric", "loss")):
        with pytest.raises(ValueError, match=f"train.{key} is set, but data.validation names no manifest"):
            read_run_config({**values, "train": {"out": "x", "max_steps": 1, key: value}})
    assert isinstance(read_run_config({**values, "train": {"out": "x", "max_steps": 1}}), RunConfig)


def test_a_report_to_what_is_not_installed_is_refused() -> None:
    check_reports(["json"])  # any module that is there
    with pytest.raises(
        ValueError, match=r"train\.report_to names nowhere, which is not installed: pip install nowhere"
    ):
        check_reports(["nowhere"])


def test_a_validation_is_told_in_a_line() -> None:
    metrics = {"eval_loss/audio=/4": 1.0, "eval_loss/audio=/8": 2.0, "eval_loss": 1.5, "eval_wer": 0.25, "epoch": 1.0}
    told = "validation after step 4: loss 1.5 (audio=/4 1, audio=/8 2); wer 0.25"
    assert validation_line(4, metrics) == told


def test_samples_are_chosen_from_everywhere() -> None:
    samples = [Sample(str(number), (), task="vqa") for number in range(10)]
    assert [sample.id for sample in spread(samples, 3)] == ["0", "3", "6"]
    assert spread(samples, 12) == samples
