"""lmms-eval itself, offline, on a task made here: its own command and ours give the answers of `mllm.Answerer`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tiny
import torch

from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.cli import main
from mllm.inference.answerer import Answerer, Decoding
from mllm.model.trainables import set_trainables


def has_lmms_eval() -> bool:
    try:
        import lmms_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_lmms_eval(), reason="needs the extra lmms; run by make test-lmms")

NAME, NUM_DOCS, QUESTION = "mllm_local_images", 4, "what colour is the circle?"
BUDGETS = ("image=64", "image=16", "image=2")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function local.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, until: ["<nothing>"]}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"])]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose answers depend on the budget."""
    folder = tmp_path_factory.mktemp("run")
    model, processor = build(tiny.settings_on(tiny.write_parts(folder / "parts")))
    set_trainables(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_run(model, processor, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path, images: list[str]) -> dict[str, list[str]]:
    """What `Answerer` says of every image, by budget."""
    answerer = Answerer(*load(run), Decoding(max_new_tokens=8))
    return {b: [answerer(QUESTION, image=path, budget=b).text for path in images] for b in BUDGETS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    return [str(folder / tiny.write_media(folder, seed=seed)["image"]) for seed in range(NUM_DOCS)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, images: list[str], expected: dict[str, list[str]]) -> Path:
    """A task folder whose right answers are those of image=16."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"image": path, "question": QUESTION, "answer": text}
        for path, text in zip(images, expected["image=16"], strict=True)
    ]
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local.py").write_text(FUNCTIONS)
    (folder / f"{NAME}.yaml").write_text(TASK.format(name=NAME, data=data))
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.update(
        {
            **{f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")},
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "WANDB_MODE": "disabled",
        }
    )


def lmms_eval(tasks: Path, model_args: str, out: Path) -> subprocess.CompletedProcess[str]:
    words = ["--model", "mllm", "--model_args", model_args, "--tasks", NAME, "--include_path", str(tasks)]
    words += ["--output_path", str(out), "--log_samples", "--batch_size", "2", "--device", "cpu"]
    return subprocess.run([sys.executable, "-m", "lmms_eval", *words], capture_output=True, text=True)


def share(texts: Sequence[str], right: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(texts, right, strict=True)) / len(right)


def test_the_entry_point_names_the_model() -> None:
    from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports]

    assert [point.value for point in entry_points(group="lmms_eval.models", name="mllm")] == ["mllm.lmms:manifest"]
    assert get_model("mllm").__name__ == "ElasticChat"
    assert not get_model("mllm").is_simple


def test_lmms_evals_own_command_gives_the_answers_of_the_answerer(
    run: Path, tasks: Path, expected: dict[str, list[str]], tmp_path: Path
) -> None:
    assert expected["image=16"] != expected["image=2"]  # or there would be nothing to tell apart
    done = lmms_eval(tasks, f"pretrained={run},budget=image=2", tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("*_results.json")
    score = json.loads(results.read_text())["results"][NAME]["exact_match,none"]
    assert score == share(expected["image=2"], expected["image=16"]) < 1
    (samples,) = tmp_path.rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
    assert [answers[doc] for doc in range(NUM_DOCS)] == expected["image=2"]


def test_a_budget_that_is_missing_ends_it_with_its_reason(run: Path, tasks: Path, tmp_path: Path) -> None:
    done = lmms_eval(tasks, f"pretrained={run}", tmp_path)
    assert "ValueError: budget is missing; give one" in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_several_budgets_in_one_run_give_the_answers_of_each(
    run: Path, tasks: Path, expected: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(run), "--tasks", NAME, "--include_path", str(tasks), "--budgets", ";".join(BUDGETS)]
    assert main(["lmms-eval", *words, "--out", str(tmp_path), "--batch_size", "3", "--log_samples", "--use_cpu"]) == 0
    shown = capsys.readouterr().out
    results = {one["budget"]: one for one in json.loads((tmp_path / "results.json").read_text())}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert list(results) == list(BUDGETS)
    for budget in BUDGETS:
        answers = {line["doc_id"]: line["filtered_resps"][0] for line in lines if line["budget"] == budget}
        assert [answers[doc] for doc in range(NUM_DOCS)] == expected[budget]
        score = share(expected[budget], expected["image=16"])
        assert results[budget]["results"]["results"][NAME]["exact_match,none"] == score
        assert results[budget]["soft_tokens"] == {"image": float(budget.partition("=")[2])}
        assert f"{score:.4f}" in shown
    assert results["image=16"]["is_trained"]
    assert not results["image=2"]["is_trained"]
    assert "image=2 (untrained)" in shown
    assert "stderr" not in shown


def test_the_media_of_a_question_are_encoded_once_for_all_budgets(run: Path, tasks: Path) -> None:
    from mllm.lmms.model import ElasticChat
    from mllm.lmms.sweep import sweep

    chat = ElasticChat(pretrained=str(run), budget=list(BUDGETS), batch_size=2, device="cpu")
    encoded = []
    encoder = chat.answers.model.model.encoder("image")
    encoder.register_forward_hook(lambda _, values, __: encoded.append(len(values[0])))
    results = list(sweep(chat, tasks=[NAME], include_path=str(tasks), batch_size=2, log_samples=False))
    assert len(results) == len(BUDGETS)
    assert sum(encoded) == NUM_DOCS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "image=999"], "allowed are counts 1..64"),
        (["--budgets", "picture=4"], "must be medium=amount"),
        (["--budgets", ";"], "budgets is empty"),
        (["--budgets", "image=4", "--tasks", "none_such"], "no task 'none_such'"),
        (["--budgets", "image=4", "--gen_kwargs", "top_k=5,temperature=0.5,do_sample=true"], "top_k is 5"),
    ],
)
def test_what_cannot_be_done_is_refused(
    run: Path, tasks: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = [] if "--tasks" in words else ["--tasks", NAME]
    assert main(["lmms-eval", "--model", str(run), "--include_path", str(tasks), "--use_cpu", *task, *words]) == 2
    assert message in capsys.readouterr().err
