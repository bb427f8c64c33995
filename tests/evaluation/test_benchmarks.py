"""Vision benchmarks from the files people download to the papers' table, an oracle and files for servers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image

from mllm.budget import Budget
from mllm.cli import main
from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.evaluation.benchmark_table import benchmark_table
from mllm.evaluation.benchmarks import DATA, MARKDOWN, PLOT, SUBMITTED, report_of
from mllm.evaluation.oracle import Oracle
from mllm.evaluation.plot import front
from mllm.evaluation.report import summarise
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.evaluation.work_list import plan
from mllm.utils.sealing import renew_seal

SHORT = "\nAnswer the question using a single word or phrase."
TOKENS = {"image=64": 64, "image=16": 16, "image=1": 1}


# Lines as a sweep leaves them, with answers that are chosen.


def line(task: str, number: object, budget: str, reference: str, said: str | None, **facts) -> dict:
    values = {"set": task, "id": str(number), "snr_db": None, "budget": budget, "task": task, "kind": None}
    values |= {"references": [reference] * 10 if task in ("textvqa", "vqav2") else [reference], "meta": {}, **facts}
    if said is None:
        return values | {"error": {"kind": "missing", "reason": "no such file"}}
    cost = dict.fromkeys(("total", "encoder", "prefill", "decode", "kv_bytes", "published", "attention"), 10**9)
    spent = {"tokens": {"image": TOKENS[budget]}, "prompt_tokens": 100, "new_tokens": 2, "seconds": None}
    return values | {"hypothesis": said, "is_trained": budget != "image=16", "cost": cost, **spent}


def gqa_lines(**said: dict[str, str | None]) -> list[dict]:
    """Of questions whose answer is "yes", what is said at each budget."""
    return [line("gqa", name, budget, "yes", one[budget]) for name, one in said.items() for budget in TOKENS]


def note(*answers: str | None) -> dict[str, str | None]:
    return dict(zip(TOKENS, answers, strict=True))


def report(lines: list[dict]):
    made = report_of(summarise(lines, seed=0, facts={"model": "tiny"}), lines)
    assert made is not None
    return made


def test_the_oracle_bills_what_is_always_wrong_both_ways() -> None:
    lines = gqa_lines(
        cheap=note("Yes.", "yes", "yes"),
        middle=note("yes", "yes", "no"),
        odd=note("no", "no", "yes"),
        never=note("no", "no", "no"),
        broken=note(None, None, None),
    )
    one = report(lines).oracles[0]
    assert one == Oracle(
        "gqa",
        "gqa",
        num_questions=5,
        num_all_wrong=2,
        smallest={"image=1": 2, "image=16": 1, "image=64": 0},
        values={"GQA": pytest.approx(60)},
        tokens=(1 + 16 + 1 + 64 + 64) / 5,
        tokens_all_wrong_smallest=(1 + 16 + 1 + 1 + 1) / 5,
    )


def test_the_oracle_takes_graded_answers_at_their_best_and_units_as_wholes() -> None:
    votes = ["red"] * 2 + ["dark"] * 8  # 0.6 and 1
    lines = [
        line("textvqa", "a", budget, "", said, references=votes) for budget, said in note("dark", "red", "no").items()
    ]
    lines += [
        line("textvqa", "b", budget, "", said, references=votes) for budget, said in note("no", "red", "red").items()
    ]
    one = report(lines).oracles[0]
    assert (one.values["TextVQA"], one.tokens) == (pytest.approx(80), (64 + 1) / 2)
    # MMBench: a question is right where all its rotations are, at one budget.
    turns = {7: note("A", "A", "B"), 1_000_007: note("A", "B", "A")}
    lines = [
        line("mmbench", index, budget, "A", said, meta={"options": ["x", "y"], "index": index})
        for index, turn in turns.items()
        for budget, said in turn.items()
    ]
    one = report(lines).oracles[0]
    assert (one.num_questions, one.smallest["image=64"], one.tokens, one.values["MMBench"]) == (1, 1, 64, 100)


def test_pope_is_scored_as_f1_under_the_oracle_too() -> None:
    labels = {"1": "yes", "2": "no", "3": "yes"}
    said = {"image=64": ("yes", "yes", "no"), "image=1": ("no", "no", "no")}
    lines = [
        line("pope", name, budget, label, answer, kind="random")
        for budget, answers in said.items()
        for (name, label), answer in zip(labels.items(), answers, strict=True)
    ]
    made = report(lines)
    assert made.table.cells[0][2] == "50.0"  # F1 at 64: one right yes, one wrong, one missed
    one = made.oracles[0]
    assert one.values["POPE (F1)"] == pytest.approx(100 * 2 / 3)
    assert one.smallest == {"image=1": 1, "image=64": 1}


def test_the_table_is_that_of_the_papers() -> None:
    lines = gqa_lines(a=note("yes", "no", None), b=note("yes", "yes", "no"))
    for budget in TOKENS:
        for kind, number in (("color", 1), ("color", 2), ("code_reasoning", 3), ("code_reasoning", 4)):
            facts = {"kind": kind, "meta": {"image": kind}}
            lines.append(line("mme", number, budget, "yes", "no" if number == 4 else "yes", **facts))
    made = report(lines)
    assert made.table.titles == ["budget", "soft tokens", "GQA", "MME-P", "MME-C", "avg"]
    average = (100 + 100 * 2 / 20 + 100 * 0.5 / 8) / 3
    assert made.table.cells == [
        ["image=64", "64", "100.0", "200.0", "50.0", f"{average:.1f}"],
        ["image=16*", "16", "50.0", "200.0", "50.0", f"{average - 50 / 3:.1f}"],
        ["image=1", "1", "0.0†", "200.0", "50.0", f"{average - 100 / 3:.1f}"],
    ]
    text = made.to_markdown()
    assert "| image=16* | 16 | 50.0 | 200.0 | 50.0 |" in text
    assert "## Failed: 1, counted as wrong\n\n- gqa a at image=1: no such file" in text
    assert len(made.table.notes) == 2
    points = made._plotted()
    assert [one["label"] for one in points] == [name for name in ("GQA", "MME-P", "MME-C", "average") for _ in TOKENS]
    assert points[3]["value"] == pytest.approx(0.1)  # 200 of 2000
    speech_only = [{"set": "t", "task": "asr", "kind": None, "snr_db": None, "budget": "audio=/4"}]
    assert benchmark_table(speech_only) is None


def test_one_benchmark_twice_is_told_apart_by_set() -> None:
    lines = gqa_lines(a=note("yes", "no", "no"))
    made = report([*lines, *({**one, "set": "again"} for one in lines)])
    assert made.table.titles == ["budget", "soft tokens", "GQA (gqa)", "GQA (again)", "avg"]


def test_the_front_holds_what_no_cheaper_budget_reaches() -> None:
    points = [{"x": x, "value": value} for x, value in ((1, 0.5), (4, 0.5), (9, 0.7), (16, 0.6), (36, 0.8))]
    assert [point["x"] for point in front(points, "x")] == [1, 9, 36]


# From files to files, through the commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, and VizWiz (test and val), POPE and MMBench in small."""
    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.model.trainables import set_trainables

    made = tmp_path_factory.mktemp("benchmarks")
    model, processor = build(tiny.settings_on(tiny.write_parts(made / "parts"), ("image",)))
    set_trainables(model)
    save_run(model, processor, made / "run")
    root = made / "vizwiz"
    (root / "test").mkdir(parents=True)
    (root / "val").mkdir()
    for number in range(3):
        Image.new("RGB", (20, 30), (80 * number, 0, 0)).save(root / "test" / f"{number}.png")
        Image.new("RGB", (20, 30), (0, 80 * number, 0)).save(root / "val" / f"{number}.png")
    (root / "val" / "3.png").write_bytes(b"no image")
    rows = [{"question_id": f"{n}.png", "image": f"{n}.png", "text": f"What?{SHORT}"} for n in range(3)]
    (root / "llava_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    votes = [{"answer": "red"}] * 10
    rows = [{"image": f"{n}.png", "question": "What?", "answers": votes} for n in range(4)]
    (root / "val.json").write_text(json.dumps(rows))
    pope = [
        Sample(
            f"{kind}{n}",
            (Message("user", (Media("image", f"val/{n}.png"), Text("A cat?"))), Message("assistant", (Text("no"),))),
            "pope",
            kind,
        )
        for kind in ("random", "popular")
        for n in range(3)
    ]
    write_manifest(root / "pope.jsonl", pope)
    mmbench = [
        Sample(
            str(index),
            (Message("user", (Media("image", "val/0.png"), Text("Which?\nA. x\nB. y"))),),
            "mmbench",
            meta={
                "options": ["x", "y"],
                "index": index,
                "row": {"question": "Which?", "A": "x", "B": "y"},
                "unanswered": True,
            },
        )
        for index in (7, 1_000_007)
    ]
    write_manifest(root / "mmbench_test.jsonl", mmbench)
    arguments = ["data", "import", "vizwiz", "--root", str(root)]
    assert main([*arguments, str(root / "val.json"), "--out", str(root / "val.jsonl")]) == 0
    assert main([*arguments, str(root), "--out", str(root / "test.jsonl")]) == 0
    return made


def words_for(folder: Path, output: Path, *names: str) -> list[str]:
    arguments = ["evaluate", "--model", str(folder / "run"), "--use-cpu", "--max-new-tokens", "3", "--out", str(output)]
    for name in names:
        arguments += ["--manifest", str(folder / "vizwiz" / f"{name}.jsonl")]
    return arguments


def test_one_command_gives_the_table_the_oracle_and_the_files_for_servers(folder: Path, tmp_path: Path, capsys) -> None:
    arguments = words_for(folder, tmp_path, "val", "pope", "test", "mmbench_test")
    arguments += ["--budgets", "image=16;image=1;image=5", "--allow_untrained"]
    assert main(arguments) == 1  # an image is none
    shown = capsys.readouterr()
    assert "failed: val 3.png at image=16: " in shown.err
    assert "VizWiz (val)" in shown.out
    assert "POPE (F1)" in shown.out
    text = (tmp_path / MARKDOWN).read_text()
    for note in (shown.out, text):
        assert "answers to val (vizwiz) were cut at max_new_tokens 3: 3 at image=16, 3 at image=5, 3 at image=1" in note
    assert "| budget | soft tokens | VizWiz (val) | POPE (F1) | VizWiz (test) | MMBench | avg |" in text
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| image=")]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [("image=16", "16"), ("image=5*", "5"), ("image=1", "1")]
    assert {(row[4], row[5]) for row in rows} == {("server", "server")}
    assert all(row[2].endswith("†") for row in rows)
    assert "## Failed: 3, counted as wrong" in text
    data = json.loads((tmp_path / DATA).read_text())
    results = {(row["set"], row["budget"]): row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert (results["val", "image=1"]["num_samples"], results["val", "image=1"]["num_failed"]) == (3, 1)
    assert [one["set"] for one in data["oracles"]] == ["val", "pope"]
    assert sum(data["oracles"][0]["smallest_right_budget"].values()) + data["oracles"][0]["num_all_wrong"] == 4
    assert (tmp_path / PLOT).stat().st_size > 10_000
    files = sorted(file.relative_to(tmp_path / SUBMITTED).as_posix() for file in (tmp_path / SUBMITTED).rglob("*.*"))
    assert files == [
        *(f"mmbench_test/mmbench-image={n}.xlsx" for n in (1, 16, 5)),
        *(f"test/vizwiz-image={n}.json" for n in (1, 16, 5)),
    ]
    handed_in = json.loads((tmp_path / SUBMITTED / "test" / "vizwiz-image=1.json").read_text())
    assert [row["image"] for row in handed_in] == ["0.png", "1.png", "2.png"]
    # What was answered is not answered again, and the files are the same.
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.suffix in (".md", ".json", ".xlsx")}
    assert main(arguments) == 1
    assert {file: file.read_bytes() for file in before} == before


def test_two_processes_leave_the_same_files(folder: Path, tmp_path: Path) -> None:
    from mllm.checkpoints.load import load
    from mllm.evaluation.answer_store import AnswerStore
    from mllm.evaluation.run import conclude, run_part
    from mllm.evaluation.sweep import Sweep
    from mllm.inference.answerer import Answerer, Decoding

    model, processor = load(str(folder / "run"))
    answerer = Answerer(model, processor, Decoding(max_new_tokens=3), batch_size=2)
    root = folder / "vizwiz"
    sets = {name: read_manifest(root / f"{name}.jsonl", root) for name in ("val", "test")}
    work = plan(sets, [Budget.parse("image=16"), Budget.parse("image=1")], space=processor.space)
    for output, num_ranks in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        for rank in range(num_ranks):
            store = AnswerStore(output, rank=rank)
            store.claim({"model": "tiny"})
            run_part(Sweep(answerer, store), work, rank=rank, num_ranks=num_ranks)
        conclude(work, AnswerStore(output), seed=0, with_plot=False)
    names = [MARKDOWN, DATA, "results.json", f"{SUBMITTED}/test/vizwiz-image=1.json"]
    assert [(tmp_path / "one" / name).read_bytes() for name in names] == [
        (tmp_path / "two" / name).read_bytes() for name in names
    ]


def test_official_files_are_evaluated_without_importing_them(folder: Path, tmp_path: Path, capsys) -> None:
    source = folder / "vizwiz" / "val.json"
    arguments = [
        "evaluate",
        "--model",
        str(folder / "run"),
        "--use-cpu",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--manifest", str(source), "--reader.format", "vizwiz", "--limit", "2", "--budgets", "image=1"]
    assert main(arguments) == 0
    assert "VizWiz" in capsys.readouterr().out


def test_one_question_without_an_answer_is_left_out_and_told(folder: Path, tmp_path: Path, capsys) -> None:
    root = folder / "vizwiz"
    shown = Message("user", (Media("image", "val/0.png"), Text(f"What?{SHORT}")))
    rows = [Sample(str(n), (shown, Message("assistant", (Text("red"),))), "gqa") for n in range(3)]
    rows[1] = replace(rows[1], meta={"answers": []})
    write_manifest(root / "gqa.jsonl", rows)
    assert main([*words_for(folder, tmp_path, "gqa"), "--budgets", "image=1"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["value"], row["num_samples"], row["num_unjudged"]) == (0.0, 3, 1)
    note = "1 answers of gqa (gqa) at image=1 have no reference and are not judged"
    assert note in (tmp_path / MARKDOWN).read_text()
    assert note in capsys.readouterr().out
    assert not (tmp_path / SUBMITTED).exists()


def test_answers_are_not_kept_when_the_processor_changed_and_a_name_keeps_both(
    folder: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    arguments = ["evaluate", "--model", str(run), "--manifest", str(folder / "vizwiz" / "pope.jsonl"), "--use-cpu"]
    arguments += ["--limit", "2", "--budgets", "image=1", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    first = (run / "evaluation" / "hypotheses.jsonl").read_bytes()
    file = run / "processor_config.json"
    changed = json.loads(file.read_text())
    changed["elastic"]["chat_format"] = "vicuna_v1"
    file.write_text(json.dumps(changed))
    renew_seal(run, [file.name])
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "model.processor_config.json has changed" in error
    assert "--name NAME" in error
    assert main([*arguments, "--name", "vicuna"]) == 0
    assert (run / "evaluation" / "vicuna" / "hypotheses.jsonl").read_bytes() != first
    assert (run / "evaluation" / "hypotheses.jsonl").read_bytes() == first
    results = [str(run / "evaluation"), str(run / "evaluation" / "vicuna")]
    assert main(["compare", *results]) == 0
    assert "run/vicuna" in capsys.readouterr().out


def test_what_cannot_be_judged_is_refused_before_anything_runs(folder: Path, tmp_path: Path, capsys) -> None:
    from mllm.checkpoints.load import load

    space = load(str(folder / "run"))[1].space
    root = folder / "vizwiz"
    known, unknown = (read_manifest(root / f"{name}.jsonl", root)[0] for name in ("val", "test"))
    shown = Message("user", (Media("image", "val/0.png"), Text("What?")))
    for samples, message in (
        ([known, unknown], "a server judges all of them or none"),
        ([Sample("a", (shown,), "textvqa")], "has no answer to compare with"),
        ([Sample("a", (shown,), "docvqa")], r"meta\.question_id is missing, which the server wants"),
        ([Sample("a", (shown, Message("assistant", (Text("A"),))), "ai2d")], r"'a' of t: meta\.options is missing"),
        ([Sample("a", (Message("user", (Text("?"),)), *known.messages[1:]), "gqa")], "holds no image"),
    ):
        with pytest.raises(ValueError, match=message):
            plan({"t": samples}, [Budget.parse("image=1")], space=space)
    arguments = [*words_for(folder, tmp_path / "x", "test"), "--budgets", "image=1"]
    (tmp_path / "all.jsonl").write_text('{"question_id": 1}\n')
    assert main([*arguments, "--vqav2_questions", str(tmp_path / "all.jsonl")]) == 2
    assert "no manifest holds samples of vqav2" in capsys.readouterr().err


def test_vqav2_is_handed_in_whole(folder: Path, tmp_path: Path) -> None:
    root = folder / "vizwiz"
    shown = Message("user", (Media("image", "val/0.png"), Text(f"What?{SHORT}")))
    write_manifest(root / "dev.jsonl", [Sample("20", (shown,), "vqav2", meta={"unanswered": True})])
    (tmp_path / "all.jsonl").write_text('{"question_id": 10}\n{"question_id": 20}\n')
    arguments = [*words_for(folder, tmp_path / "out", "dev"), "--budgets", "image=1"]
    assert main([*arguments, "--vqav2_questions", str(tmp_path / "all.jsonl")]) == 0
    handed_in = json.loads((tmp_path / "out" / SUBMITTED / "dev" / "vqav2-image=1.json").read_text())
    assert [row["question_id"] for row in handed_in] == [10, 20]
    assert handed_in[0]["answer"] == ""


def test_every_benchmark_is_a_task_of_the_evaluation() -> None:
    from mllm.evaluation.scoring import scorer_of

    assert all(scorer_of(name).counts_failures for name in BENCHMARKS)
    assert not any(scorer_of(name).counts_failures for name in ("asr", "vsr", "avsr", "vqa"))
