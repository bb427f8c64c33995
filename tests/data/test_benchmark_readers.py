"""Small files in the official layouts of thirteen vision benchmarks become questions with their official prompts."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from mllm.cli import main
from mllm.config.data import BENCHMARK_FORMATS, Format, ReaderConfig
from mllm.data.manifest import Sample, read_manifest
from mllm.data.readers import READERS, read_data
from mllm.data.table_files import table_files
from mllm.evaluation.scorers.registry import BENCHMARKS

SHORT = "\nAnswer the question using a single word or phrase."
CHOOSE = "\nAnswer with the option's letter from the given choices directly."
VOTES = ["red"] * 7 + ["dark red"] * 3


def png(shade: int = 0) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(held, "PNG")
    return held.getvalue()


def put(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def put_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def put_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def imported(form: Format, source: Path, *words: str, code: int = 0) -> dict[str, Sample]:
    """Import through the command, and return it; what is read back can be judged, or is for a server."""
    out = source.parent / f"{form}.manifest.jsonl"
    root = source if source.is_dir() else source.parent
    command = ["data", "import", form, str(source), "--root", str(root), "--out", str(out), *words]
    assert main(command) == code
    samples = read_manifest(out, root)
    for sample in samples:
        answers = sample.meta.get("answers", [sample.messages[-1].text])
        BENCHMARKS[sample.task].check([] if sample.meta.get("unanswered") else answers, sample.meta)
    return {sample.id: sample for sample in samples}


def question_of(sample: Sample) -> str:
    return sample.messages[0].text


def image_path(sample: Sample) -> str:
    return next(iter(sample.media)).path


def test_every_benchmark_has_a_reader_and_a_scorer() -> None:
    assert tuple(READERS) == get_args(Format)
    assert set(BENCHMARK_FORMATS) == set(BENCHMARKS)


def test_vqav2(tmp_path: Path) -> None:
    root = tmp_path / "vqav2"
    put(root, "test2015/a.jpg", "val2014/COCO_val2014_000000000042.jpg")
    put_lines(
        root / "llava_vqav2_mscoco_test-dev2015.jsonl",
        {"question_id": 262144005, "image": "a.jpg", "text": f"Is it?{SHORT}", "category": "default"},
    )
    one = imported("vqav2", root)["262144005"]
    assert (question_of(one), image_path(one)) == (f"\nIs it?{SHORT}", "test2015/a.jpg")
    assert one.meta == {"unanswered": True}
    assert one.messages[-1].role == "user"
    questions = root / "v2_OpenEnded_mscoco_val2014_questions.json"
    put_json(questions, {"questions": [{"question_id": 42000, "image_id": 42, "question": "What colour?"}]})
    notes = [{"question_id": 42000, "answer_type": "other", "answers": [{"answer": vote} for vote in VOTES]}]
    put_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    two = imported("vqav2", questions)["42000"]
    assert (two.messages[-1].text, two.meta["answers"], two.kind) == ("red", VOTES, "other")
    assert (question_of(two), image_path(two)) == (f"\nWhat colour?{SHORT}", "val2014/COCO_val2014_000000000042.jpg")


def test_gqa(tmp_path: Path) -> None:
    root = tmp_path / "gqa"
    put(root, "data/images/n1.jpg")
    row = {"question_id": "201307251", "image": "n1.jpg", "text": f"Is it white?{SHORT}"}
    put_lines(root / "llava_gqa_testdev_balanced.jsonl", row, {**row, "question_id": "7"})
    note = {"answer": "no", "types": {"structural": "verify"}}
    put_json(root / "data" / "testdev_balanced_questions.json", {"201307251": note})
    result = imported("gqa", root, code=1)  # the other question has no answer: it is told
    assert (result["201307251"].messages[-1].text, result["201307251"].kind) == ("no", "binary")
    assert list(result) == ["201307251"]


@pytest.mark.parametrize("with_ocr", [True, False])
def test_textvqa_with_and_without_ocr_tokens(tmp_path: Path, with_ocr: bool) -> None:
    root = tmp_path / "textvqa"
    put(root, "train_images/p.jpg")
    text = f"what is the Brand?\nReference OCR token: DAKOTA, DIGITAL{SHORT}"
    put_lines(root / "llava_textvqa_val_v051_ocr.jsonl", {"question_id": "003a8ae2", "image": "p.jpg", "text": text})
    note = {"question_id": 34602, "image_id": "003a8ae2", "question": "what is the brand?", "answers": VOTES}
    put_json(root / "TextVQA_0.5.1_val.json", {"data": [note]})
    one = imported("textvqa", root, *([] if with_ocr else ["--ocr_tokens", "false"]))["34602"]
    assert question_of(one) == "\n" + (text if with_ocr else f"what is the Brand?{SHORT}")
    assert one.meta["answers"] == VOTES


def test_vizwiz(tmp_path: Path) -> None:
    root = tmp_path / "vizwiz"
    put(root, "test/t.jpg", "val/v.jpg")
    unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    row = {"question_id": "t.jpg", "image": "t.jpg", "text": f"Ok?{unsure}{SHORT}"}
    put_lines(root / "llava_test.jsonl", row)
    one = imported("vizwiz", root)["t.jpg"]
    assert (one.meta, image_path(one)) == ({"image": "t.jpg", "unanswered": True}, "test/t.jpg")
    answers = [{"answer": vote, "answer_confidence": "yes"} for vote in VOTES]
    row = {"image": "v.jpg", "question": "Ok?", "answers": answers, "answer_type": "other", "answerable": 1}
    put_json(root / "val.json", [row])
    two = imported("vizwiz", root / "val.json")["v.jpg"]
    assert (question_of(two), two.meta["answers"]) == (question_of(one), VOTES)


def test_pope_finds_labels_by_image_and_words_whatever_the_order(tmp_path: Path) -> None:
    root = tmp_path / "pope"
    put(root, "val2014/a.jpg", "val2014/b.jpg")
    labels = {("a.jpg", "Is there a cat?"): "yes", ("b.jpg", "Is there a cat?"): "no", ("b.jpg", "A dog?"): "yes"}
    rows = []
    for category in ("random", "popular", "adversarial"):
        notes = [
            {"question_id": number, "image": image, "text": text, "label": label}
            for number, ((image, text), label) in enumerate(labels.items(), start=1)
        ]
        put_lines(root / "coco" / f"coco_pope_{category}.json", *reversed(notes))
        rows += [{**note, "text": note["text"] + SHORT, "category": category} for note in notes]
    put_lines(root / "llava_pope_test.jsonl", *({k: v for k, v in row.items() if k != "label"} for row in rows))
    result = imported("pope", root)
    assert list(result) == ["1", "2", "3", "1#2", "2#2", "3#2", "1#3", "2#3", "3#3"]
    assert {sample.kind for sample in result.values()} == {"random", "popular", "adversarial"}
    for sample in result.values():
        words = question_of(sample).removesuffix(SHORT).strip()
        assert sample.messages[-1].text == labels[image_path(sample).removeprefix("val2014/"), words]
    for file in (root / "coco").iterdir():  # as some hand them out
        file.write_text(file.read_text().replace('"yes"', '"Yes"').replace('"no"', '"NO"'))
    assert imported("pope", root) == result


def test_mme_finds_answers_beside_images(tmp_path: Path) -> None:
    root = tmp_path / "MME"
    base = root / "MME_Benchmark_release_version"
    put(base, "color/1.jpg", "landmark/images/2.jpg")
    (base / "color" / "1.txt").write_text(
        "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    )
    (base / "landmark" / "questions_answers_YN").mkdir()
    (base / "landmark" / "questions_answers_YN" / "2.txt").write_text(
        "Is it Rome? Please answer yes or no.\tYes\nIs it Oslo? Please answer yes or no.\tNo\n"
    )
    pairs = [("color/1.jpg", "Is it red?"), ("color/1.jpg", "Is it blue?")]
    pairs += [("landmark/2.jpg", "Is it Oslo?"), ("landmark/2.jpg", "Is it Rome?")]
    rows = [{"question_id": name, "image": name, "text": text + SHORT} for name, text in pairs]
    put_lines(root / "llava_mme.jsonl", *rows)
    result = imported("mme", root)
    assert {name: sample.messages[-1].text for name, sample in result.items()} == {
        "color/1.jpg": "yes",
        "color/1.jpg#2": "no",
        "landmark/2.jpg": "no",
        "landmark/2.jpg#2": "yes",
    }
    assert image_path(result["landmark/2.jpg"]).endswith("landmark/images/2.jpg")
    put_lines(root / "llava_mme.jsonl", *rows[:3])
    with pytest.raises(ValueError, match="has 1 questions; MME has two per image"):
        read_data(root, None, ReaderConfig(format="mme"))


def test_scienceqa_asks_what_has_an_image(tmp_path: Path) -> None:
    root = tmp_path / "scienceqa"
    put(root, "images/test/5/image.png")
    said = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    rows = [{"id": "5", "image": "5/image.png", "conversations": said}, {"id": "6", "conversations": said}]
    put_json(root / "llava_test_CQM-A.json", rows)
    put_json(root / "problems.json", {"5": {"choices": ["x", "y"], "answer": 1, "subject": "natural science"}})
    result = imported("scienceqa", root)
    assert list(result) == ["5"]
    assert question_of(result["5"]) == f"\nWhich?\nA. x\nB. y{CHOOSE}"
    assert (result["5"].messages[-1].text, result["5"].meta) == ("B", {"options": ["x", "y"]})


def write_mmbench(path: Path, *, with_answers: bool = True) -> None:
    """Write two questions with two rotations each; the second of the rotations names its image by index."""
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    image = base64.b64encode(png()).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(columns if with_answers else [name for name in columns if name != "answer"])
        for index, hint in ((7, "Look."), (8, "nan")):
            for turn, options in enumerate((["x", "y"], ["y", "x"])):
                held = image if turn == 0 else index
                row = [index + turn * 1_000_000, 'Which "one"?', hint, *options, "", "", "AB"[turn], "c", held, "l2"]
                writer.writerow(row if with_answers else [*row[:7], *row[8:]])


def test_mmbench_takes_images_out_of_the_table(tmp_path: Path) -> None:
    root = tmp_path / "mmbench"
    write_mmbench(root / "mmbench_dev_20230712.tsv")
    result = imported("mmbench", root)
    assert list(result) == ["7", "1000007", "8", "1000008"]
    assert question_of(result["7"]) == f'\nLook.\nWhich "one"?\nA. x\nB. y{CHOOSE}'
    assert question_of(result["1000008"]) == f'\nWhich "one"?\nA. y\nB. x{CHOOSE}'
    assert [sample.messages[-1].text for sample in result.values()] == ["A", "B", "A", "B"]
    assert len(list((root / "images").iterdir())) == 1
    assert {image_path(sample) for sample in result.values()} == {
        file.relative_to(root).as_posix() for file in (root / "images").iterdir()
    }
    write_mmbench(root / "test" / "mmbench_test_20230712.tsv", with_answers=False)
    assert imported("mmbench", root / "test")["7"].meta["unanswered"]


def test_seedbench(tmp_path: Path) -> None:
    root = tmp_path / "seed_bench"
    put(root, "SEED-Bench-image/1_2", "SEED-Bench-video-image/t_0.png")
    rows = [("1", "SEED-Bench-image/1_2", "image"), ("2", "SEED-Bench-video-image/t_0.png", "video")]
    put_lines(
        root / "llava-seed-bench.jsonl",
        *({"question_id": name, "image": file, "text": f"Which?\nA. x\nB. y{CHOOSE}"} for name, file, _ in rows),
    )
    notes = [
        {"question_id": name, "answer": "B", "choice_a": "x", "choice_b": "y", "data_type": form, "question_type_id": 1}
        for name, _, form in rows
    ]
    put_json(root / "SEED-Bench.json", {"questions": notes, "question_type": {"Scene Understanding": 1}})
    result = imported("seedbench", root)
    assert [(one.kind, one.meta["data_type"], one.messages[-1].text) for one in result.values()] == [
        ("Scene Understanding", "image", "B"),
        ("Scene Understanding", "video", "B"),
    ]


def test_a_letter_beyond_the_options_is_a_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mmbench"
    write_mmbench(root / "mmbench_dev_20230712.tsv")
    table = root / "mmbench_dev_20230712.tsv"
    table.write_text(table.read_text().replace("\tA\tc\t", "\tC\tc\t", 1))
    assert list(imported("mmbench", root, code=1)) == ["1000007", "8", "1000008"]
    assert "answer must be one of A, B, got 'C'" in capsys.readouterr().out


def test_chartqa_and_docvqa_from_official_files(tmp_path: Path) -> None:
    charts, pages = tmp_path / "chartqa", tmp_path / "docvqa"
    put(charts, "test/png/c.png")
    for name, label in (("human", "14"), ("augmented", "Yes")):
        put_json(charts / "test" / f"test_{name}.json", [{"imgname": "c.png", "query": "How much?", "label": label}])
    result = imported("chartqa", charts)
    assert {name: sample.messages[-1].text for name, sample in result.items()} == {
        "human-0": "14",
        "augmented-0": "Yes",
    }
    assert question_of(result["human-0"]) == f"\nHow much?{SHORT}"
    put(pages, "documents/p_1.png")
    row = {"questionId": 337, "question": "What date?", "image": "documents/p_1.png", "answers": ["1/8/93", "1/8"]}
    put_json(pages / "val_v1.0.json", {"data": [row]})
    one = imported("docvqa", pages)["337"]
    assert (one.meta, image_path(one)) == ({"question_id": 337, "answers": ["1/8/93", "1/8"]}, "documents/p_1.png")
    put_json(pages / "test_v1.0.json", {"data": [{key: value for key, value in row.items() if key != "answers"}]})
    assert imported("docvqa", pages / "test_v1.0.json")["337"].meta["unanswered"]


def test_missing_images_and_files_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "vizwiz"
    put(root, "test/a.jpg")
    rows = [{"question_id": name, "image": name, "text": f"Ok?{SHORT}"} for name in ("a.jpg", "b.jpg")]
    put_lines(root / "llava_test.jsonl", *rows)
    assert list(imported("vizwiz", root, code=1)) == ["a.jpg"]
    assert "test/b.jpg" in capsys.readouterr().out
    assert main(["data", "import", "gqa", str(root), "--out", str(tmp_path / "x.jsonl")]) != 0
    assert "holds no file of questions; looked for llava_gqa_testdev_balanced.jsonl" in capsys.readouterr().err


def test_settings_of_other_formats_are_refused() -> None:
    for settings, message in (
        ({"format": "gqa", "ocr_tokens": False}, "ocr_tokens goes with the format textvqa"),
        ({"format": "llava", "images": "x"}, "images goes with vision benchmarks, not llava"),
        ({"format": "gqa", "split": "val"}, "split goes with the formats mmmu, ai2d"),
    ):
        with pytest.raises(ValueError, match=message):
            ReaderConfig(**settings)


# Tables: what hubs hand out as parquet, and what datasets saves as arrow.


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)


def cell(shade: int) -> dict[str, Any]:
    return {"bytes": png(shade), "path": f"{shade}.png"}


def test_mmmu_stands_its_images_where_the_text_names_them(tmp_path: Path) -> None:
    root = tmp_path / "MMMU"
    common = {"explanation": "", "image_3": None}
    for subject, rows in {
        "Art": [
            {
                "question": "See <image 2> and <image 1>: which?",
                "options": "['<image 1>', \"it's\"]",
                "answer": "B",
                "question_type": "multiple-choice",
            }
        ],
        "Math": [
            {"question": "<image 1> How many?", "options": "[]", "answer": "['4', 'four']", "question_type": "open"},
            {"question": "<image 9> Lost?", "options": "[]", "answer": "4", "question_type": "open"},
        ],
    }.items():
        rows = [
            {**common, **row, "id": f"validation_{subject}_{n}", "image_1": cell(1), "image_2": cell(2)}
            for n, row in enumerate(rows, start=1)
        ]
        write_table(root / subject / "validation-00000-of-00001.parquet", rows)
        write_table(root / subject / "test-00000-of-00001.parquet", [{**rows[0], "id": "test_Art_1", "answer": "?"}])
    result = imported("mmmu", root, code=1)  # the lost image is told
    assert list(result) == ["validation_Art_1", "validation_Math_1"]
    art, count = result.values()
    assert question_of(art) == f"See  and : which?\nA. \nB. it's\n{CHOOSE}"
    assert len(list(art.media)) == 3
    assert [part.path for part in art.media][1] == [part.path for part in art.media][2] == image_path(count)
    assert (art.kind, art.messages[-1].text, art.meta) == ("Art", "B", {"options": ["<image 1>", "it's"]})
    assert (count.meta["answers"], count.meta["options"]) == (["4", "four"], [])
    assert question_of(count).endswith(f"How many?\n{SHORT}")
    result = imported("mmmu", root, "--split", "test")
    assert [sample.meta["unanswered"] for sample in result.values()] == [True, True]
    assert main(["data", "import", "mmmu", str(root), "--split", "dev", "--out", str(tmp_path / "x.jsonl")]) != 0


@pytest.mark.parametrize(
    "location", ["data/test-00000-of-00001.parquet", "test/data-00000-of-00001.arrow", "test.arrow"]
)
def test_ai2d_from_parquet_and_from_what_datasets_saved(tmp_path: Path, location: str) -> None:
    root = tmp_path / "ai2d"
    rows = [{"question": "Which?", "options": ["p", "q", "r"], "answer": str(n), "image": cell(n)} for n in (2, 0)]
    write_table(root / location, rows)
    result = imported("ai2d", root if "/" in location else root / location)
    assert [sample.messages[-1].text for sample in result.values()] == ["C", "A"]
    assert question_of(result["0"]) == f"\nWhich?\nA. p\nB. q\nC. r{CHOOSE}"


def test_an_answer_beyond_the_options_of_a_table_is_a_bad_row(tmp_path: Path, capsys) -> None:
    rows = [{"question": "Which?", "options": ["p", "q"], "answer": at, "image": cell(1)} for at in ("1", "2", "-1")]
    write_table(tmp_path / "ai2d" / "test-0.parquet", rows)
    assert {name: one.messages[-1].text for name, one in imported("ai2d", tmp_path / "ai2d", code=1).items()} == {
        "0": "B"
    }
    message = capsys.readouterr().out
    assert "got 2" in message
    assert "got -1" in message
    write_table(tmp_path / "halves" / "test-0.parquet", [{**rows[0], "answer": 1.5}])
    with pytest.raises(ValueError, match=r"answer must be the place of one of 2 options, from 0; got 1\.5"):
        read_data(tmp_path / "halves", None, ReaderConfig(format="ai2d"))
    rows = [{"question": "Which?", "choices": ["x", "y"], "answer": at, "image": cell(1)} for at in (0, 25)]
    write_table(tmp_path / "s" / "test-0.parquet", rows)
    assert [one.messages[-1].text for one in imported("scienceqa", tmp_path / "s", code=1).values()] == ["A"]
    common = {"question": "<image 1> Which?", "options": "['x', 'y']", "question_type": "multiple-choice"}
    rows = [{**common, "id": f"validation_Art_{at}", "answer": at, "image_1": cell(1)} for at in ("B", "Z")]
    write_table(tmp_path / "MMMU" / "validation-0.parquet", rows)
    assert list(imported("mmmu", tmp_path / "MMMU", code=1)) == ["validation_Art_B"]


def test_one_saved_split_says_which_it_is(tmp_path: Path) -> None:
    write_table(tmp_path / "data-00000-of-00001.arrow", [{"question": "Which?"}])
    put_json(tmp_path / "state.json", {"_split": "validation"})
    assert table_files(tmp_path, "validation") == [tmp_path / "data-00000-of-00001.arrow"]
    with pytest.raises(FileNotFoundError, match="holds no table of the split test"):
        table_files(tmp_path, "test")


def test_charts_documents_and_science_from_tables(tmp_path: Path) -> None:
    rows = [
        {"type": "human_test", "question": "How much?", "answer": "3", "image": cell(1)},
        {"type": "augmented_test", "question": "How much?", "answer": "4", "image": cell(2)},
    ]
    write_table(tmp_path / "c" / "data" / "test-0.parquet", rows)
    assert {one.kind: one.messages[-1].text for one in imported("chartqa", tmp_path / "c").values()} == {
        "human": "3",
        "augmented": "4",
    }
    write_table(
        tmp_path / "d" / "test-0.parquet", [{"query": "q", "label": ["3"], "human_or_machine": 1, "image": cell(1)}]
    )
    assert imported("chartqa", tmp_path / "d")["augmented-0"].messages[-1].text == "3"
    row = {"questionId": "49153", "question": "What?", "answers": ["p", "q"], "image": cell(1)}
    write_table(tmp_path / "p" / "DocVQA" / "validation-0.parquet", [row])
    write_table(tmp_path / "p" / "InfographicVQA" / "validation-0.parquet", [{**row, "questionId": "1"}])
    write_table(tmp_path / "p" / "DocVQA" / "test-0.parquet", [{**row, "answers": None}])
    assert imported("docvqa", tmp_path / "p")["49153"].meta == {"question_id": 49153, "answers": ["p", "q"]}
    assert imported("docvqa", tmp_path / "p", "--split", "test")["49153"].meta["unanswered"]
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "h", "subject": "s", "image": cell(1)}
    write_table(tmp_path / "s" / "data" / "test-0.parquet", [row, {**row, "image": None}])
    result = imported("scienceqa", tmp_path / "s")
    assert question_of(result["0"]) == f"\nContext: h\nWhich?\nA. x\nB. y{CHOOSE}"
    assert (result["0"].messages[-1].text, list(result)) == ("B", ["0"])


def test_tables_without_pyarrow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 not a table")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert main(["data", "import", "ai2d", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]) != 0
    assert "pip install -e '.[tables]'" in capsys.readouterr().err
