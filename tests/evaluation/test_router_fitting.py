"""From answers at fixed budgets to answers at `auto`, by the commands; and which answers no router may be fitted on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from mllm.checkpoints.build import build
from mllm.checkpoints.load import TRAINABLES, save_run
from mllm.cli import main
from mllm.config.router import RouterFitConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.answer_store import HYPOTHESES
from mllm.evaluation.answer_table import tables_of
from mllm.evaluation.router_fitting import read_answers
from mllm.inference.answerer import Answerer
from mllm.model.trainables import set_trainables
from mllm.router.router import FILE, WEIGHTS, load_router
from mllm.utils.run_paths import RUN_CONFIG
from mllm.utils.sealing import renew_seal

BUDGETS = ["image=1", "image=4", "image=64"]
QUESTIONS = {"colour": "what colour is the circle?", "count": "how many objects?"}
NUM_IMAGES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, a manifest of two questions about each of some images, answered at fixed budgets."""
    made = tmp_path_factory.mktemp("router")
    model, processor = build(tiny.settings_on(tiny.write_parts(made / "parts"), ("image",)))
    set_trainables(model)
    save_run(model, processor, made / "run")
    rng = np.random.default_rng(0)
    samples = []
    for number in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(made / f"{number}.png")
        for kind, text in QUESTIONS.items():
            parts = (Media("image", f"{number}.png"), Text(text))
            messages = (Message("user", parts), Message("assistant", (Text("red"),)))
            samples.append(Sample(f"{number}-{kind}", messages, "vqa", kind))
    write_manifest(made / "held_out.jsonl", samples)
    assert evaluate(made, "fixed", ";".join(BUDGETS)) == 0
    assert fit(made) == 0
    return made


def evaluate(folder: Path, name: str, budgets: str) -> int:
    words = ["evaluate", "--model", str(folder / "run"), "--manifest", str(folder / "held_out.jsonl"), "--name", name]
    return main([*words, "--budgets", budgets, "--max_new_tokens", "4", "--use_cpu"])


def fit(folder: Path, *, manifest: str = "held_out.jsonl", answers: str = "fixed") -> int:
    words = ["router", "fit", "--model", str(folder / "run"), "--manifest", str(folder / manifest), "--use_cpu"]
    return main([*words, "--answers", str(folder / "run" / "evaluation" / answers)])


def lines_of(folder: Path, name: str) -> list[dict]:
    text = (folder / "run" / "evaluation" / name / HYPOTHESES).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_table_holds_every_question_at_every_budget(folder: Path) -> None:
    config = RouterFitConfig(
        model=str(folder / "run"),
        answers=str(folder / "run" / "evaluation" / "fixed"),
        manifest=[str(folder / "held_out.jsonl")],
    )
    answers = read_answers(config)
    table = tables_of(answers.lines, answers.samples)["image",]
    assert [str(budget) for budget in table.budgets] == BUDGETS
    assert (len(table), len(table.units())) == (NUM_IMAGES * len(QUESTIONS), NUM_IMAGES)
    assert set(table.kinds) == set(QUESTIONS)
    by_key = {(line["id"], line["budget"]): line for line in answers.lines}
    for row, (_, sample_id) in enumerate(table.sample_keys):
        for column, budget in enumerate(BUDGETS):
            line = by_key[sample_id, budget]
            assert table.confidence[row, column] == line["min_probability"]
            assert table.tokens[row, column] == line["tokens"]["image"]
            assert table.flops is not None
            assert table.flops[row, column] == line["cost"]["total"]
    # What failed at one budget is compared at none.
    failed = [
        line | {"error": {}} if line["budget"] == "image=4" and line["id"] == "0-count" else line
        for line in answers.lines
    ]
    assert len(tables_of(failed, answers.samples)["image",]) == len(table) - 1
    nothing = [line | {"error": {}} for line in answers.lines]
    for lines in (nothing, [line for line in nothing if line["budget"] == "image=4"]):
        with pytest.raises(ValueError, match="none of 40 questions was answered at each of its budgets"):
            tables_of(lines, answers.samples)
    half = [line for line in answers.lines if (line["budget"] == "image=1") == line["id"].endswith("-count")]
    with pytest.raises(ValueError, match="none of 40 questions was answered at each of image=1; image=4; image=64"):
        tables_of(half, answers.samples)


def test_auto_answers_at_trained_budgets_and_bills_what_was_read(folder: Path) -> None:
    # At no price the router grows wherever anything might be gained.
    assert evaluate(folder, "auto", "auto,price=0;auto,mean_tokens<=4;image=4;flops<=1e12") == 0
    fixed = {(line["id"], line["budget"]): line for line in lines_of(folder, "fixed")}
    lines = lines_of(folder, "auto")
    assert len(lines) == 4 * NUM_IMAGES * len(QUESTIONS)
    for line in lines:
        if line["budget"] == "image=4":
            assert "served" not in line
            continue
        assert line["served"] in [*BUDGETS, "image=16"]
        assert line["is_trained"]
        if line["budget"].startswith("flops"):
            assert (line["served"], line["num_discarded"]) == ("image=64", 0)
        if line["num_discarded"] == 0 and line["served"] in BUDGETS:
            expected = fixed[line["id"], line["served"]]
            for key in ("hypothesis", "tokens", "cost", "prompt_tokens"):
                assert line[key] == expected[key]
        elif line["num_discarded"]:
            served = fixed[line["id"], line["served"]]
            assert line["hypothesis"] == served["hypothesis"]
            assert line["tokens"]["image"] > served["tokens"]["image"]
            assert line["cost"]["prefill"] > served["cost"]["prefill"]
            assert line["cost"]["encoder"] == served["cost"]["encoder"], "encoded once"
            parts = ("encoder", "compressor", "prefill", "decode")
            assert line["cost"]["total"] == sum(line["cost"][part] for part in parts)


def test_python_and_generate_take_the_same_router(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mllm

    model, processor = mllm.load(folder / "run", device="cpu")
    router = load_router(folder / "run")
    assert router.of(("image",)).num_questions == NUM_IMAGES * len(QUESTIONS)
    answer = Answerer(model, processor, router=router).answer(
        QUESTIONS["colour"], image=folder / "0.png", budget="auto,price=0.001"
    )
    capsys.readouterr()
    words = ["generate", "--model", str(folder / "run"), "--image", str(folder / "0.png"), "--use_cpu"]
    assert main([*words, "--text", QUESTIONS["colour"], "--budget", "auto,price=0.001"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == answer.text
    assert f"soft tokens: image {answer.tokens['image']} at {answer.budget}" in said.err
    grown = Answerer(model, processor, router=router).answer(
        QUESTIONS["colour"], image=folder / "0.png", budget="auto,price=0"
    )
    request = {"image": "0.png", "text": QUESTIONS["colour"], "budget": "auto,price=0"}
    (folder / "list.jsonl").write_text(json.dumps(request) + "\n")
    words = ["generate", "--model", str(folder / "run"), "--inputs", str(folder / "list.jsonl"), "--use_cpu"]
    assert main(words) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["answer"], line["budget"]) == (grown.text, str(grown.budget))
    assert (line["tokens"], line["num_discarded"]) == (grown.tokens, len(grown.discarded))


def test_media_that_a_router_has_seen_are_known_under_any_path(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (*folder.glob("*.png"), folder / "held_out.jsonl"):
        shutil.copy(file, tmp_path)
    answers, copied = str(folder / "run" / "evaluation" / "fixed"), str(tmp_path / "held_out.jsonl")
    words = ["--model", str(folder / "run"), "--answers", answers, "--use_cpu"]
    assert main(["router", "certify", *words, "--manifest", copied]) == 2
    assert f"was fitted on {NUM_IMAGES} of the {NUM_IMAGES} images or clips" in capsys.readouterr().err
    test = ["--test_answers", answers, "--test_manifest", copied, "--out", str(tmp_path / "out")]
    assert main(["router", "report", *words, "--manifest", str(folder / "held_out.jsonl"), *test]) == 2
    assert "test_manifest holds sample '0-colour', whose media are in manifest too" in capsys.readouterr().err


def test_answers_that_no_router_may_be_fitted_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "run"
    shutil.copy(folder / "held_out.jsonl", folder / "trained.jsonl")
    (run / RUN_CONFIG).write_text(yaml.safe_dump({"data": {"train": [str(folder / "trained.jsonl")]}}))
    assert fit(folder) == 2
    assert "held_out.jsonl is what the model was trained on" in capsys.readouterr().err
    (run / RUN_CONFIG).unlink()
    (folder / "other.jsonl").write_text((folder / "held_out.jsonl").read_text().replace("0-colour", "9-other"))
    assert fit(folder, manifest="other.jsonl") == 2
    assert "holds answers to held_out, and not to other" in capsys.readouterr().err
    assert fit(folder, answers="nowhere") == 2
    assert "answers names the folder of a finished evaluation" in capsys.readouterr().err
    weights = (run / TRAINABLES).read_bytes()
    (run / TRAINABLES).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    renew_seal(run, [TRAINABLES])
    assert fit(folder) == 2
    assert f"holds answers of another model than {run}: {TRAINABLES} differ" in capsys.readouterr().err
    assert evaluate(folder, "stale", "auto") == 2
    assert f"was fitted for another model: {TRAINABLES} changed since" in capsys.readouterr().err
    (run / TRAINABLES).write_bytes(weights)
    renew_seal(run, [TRAINABLES])
    for file in (FILE, WEIGHTS):
        (run / file).rename(folder / file)
    assert evaluate(folder, "none", "auto") == 2
    assert "auto needs a router: mllm router fit" in capsys.readouterr().err
    for file in (FILE, WEIGHTS):
        (folder / file).rename(run / file)
