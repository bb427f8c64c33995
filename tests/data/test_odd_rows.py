"""Odd rows that ended an import: each is one line in the report, and the others are written."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.cli import main
from mllm.config.data import ReaderConfig
from mllm.data.manifest import Sample, read_manifest
from mllm.data.readers import read_data, read_listing
from mllm.media import write_audio, write_video

SHORT = "\nAnswer the question using a single word or phrase."


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(held, "PNG")
    path.write_bytes(held.getvalue())
    return path


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(form: str, source: Path, root: Path, capsys: pytest.CaptureFixture, code: int) -> tuple[list[Sample], str]:
    out = root / "out.jsonl"
    assert main(["data", "import", form, str(source), "--root", str(root), "--out", str(out)]) == code
    shown = capsys.readouterr()
    return (read_manifest(out, root) if out.exists() else []), shown.out + shown.err


def turns(value: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}]


def test_an_image_that_is_null_is_a_sample_of_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "imgnull.json").write_text(json.dumps([{"id": "t", "image": None, "conversations": turns("Hello")}]))
    (sample,), _ = imported("llava", tmp_path / "imgnull.json", tmp_path, capsys, 0)
    assert sample.media == ()
    assert [message.text for message in sample.messages] == ["Hello", "x"]


@pytest.mark.parametrize("by_lines", [False, True])
def test_one_bad_conversation_is_reported_and_the_others_are_written(tmp_path: Path, capsys, by_lines: bool) -> None:
    image(tmp_path / "a.png")
    rows = [{"id": str(n), "image": "a.png", "conversations": turns("<image>\nWhat?")} for n in range(3)]
    rows.append({"id": "bad", "image": "a.png", "conversations": turns("<image>\n<image>\nWhat?")})
    path = tmp_path / "onebad.json"
    lines(path, *rows) if by_lines else path.write_text(json.dumps(rows))
    samples, shown = imported("llava", path, tmp_path, capsys, 1)
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    index = "onebad.json:4" if by_lines else "onebad.json: entry 3"
    assert f"{index}" in shown
    assert "(id 'bad'): 2 <image> markers for 1 images" in shown


def test_keys_that_llava_does_not_have_are_left_out_and_reported(tmp_path: Path, caplog) -> None:
    rows = [{"id": "0", "conversations": turns("Hi"), "source": "web", "length": 3}, {"conversations": turns("Hi")}]
    samples = read_data(lines(tmp_path / "l.jsonl", *rows), None, ReaderConfig(format="llava"))
    assert [sample.id for sample in samples] == ["0", "l-2"]
    assert "1 samples hold the key 'source', which is not read" in caplog.text


def test_pope_without_labels_is_reported_row_by_row(tmp_path: Path, capsys) -> None:
    image(tmp_path / "val2014" / "x.jpg")
    question = {"question_id": 1, "image": "x.jpg", "text": f"Is there a cat?{SHORT}", "category": "random"}
    lines(tmp_path / "llava_pope_test.jsonl", question)
    for category in ("adversarial", "popular", "random"):
        note = {"question_id": 1, "image": "x.jpg", "text": "Is there a cat?"}
        lines(tmp_path / "coco" / f"coco_pope_{category}.json", note)
    listing = read_listing(tmp_path, tmp_path, ReaderConfig(format="pope"))
    assert not listing.samples
    message = [str(finding).replace(str(tmp_path), "") for finding in listing.problems]
    assert message[:3] == [
        f"/coco/coco_pope_{one}.json:1: 'label' is missing" for one in ("random", "popular", "adversarial")
    ]
    assert message[3].startswith("/llava_pope_test.jsonl:1: ")
    assert message[3].endswith("the label files hold no labels")
    _, shown = imported("pope", tmp_path, tmp_path, capsys, 2)
    assert "the label files hold no labels" in shown


MME_ANSWERS = "Is it A? Please answer yes or no.\tYes\nIs it B? Please answer yes or no.\tNo\n"


def mme(root: Path, *texts: object, question_id: object = "OCR/0001.jpg") -> list[Sample]:
    base = root / "MME_Benchmark_release_version" / "OCR"
    image(base / "0001.jpg")
    (base / "0001.txt").write_text(MME_ANSWERS)
    rows = [{"question_id": question_id, "image": "OCR/0001.jpg", "text": text, "category": "OCR"} for text in texts]
    lines(root / "llava_mme.jsonl", *rows)
    return read_data(root, root, ReaderConfig(format="mme"))


def test_mme_with_and_without_the_official_phrase_is_the_same(tmp_path: Path) -> None:
    plain = mme(tmp_path, f"Is it A?{SHORT}", f"Is it B?{SHORT}")
    ask = " Please answer yes or no."
    assert mme(tmp_path, f"Is it A?{ask}{SHORT}", f"Is it B?{ask}{SHORT}") == plain
    assert mme(tmp_path, f"Is it A?{SHORT}", f"Is it B?{ask}{SHORT}") == plain
    assert mme(tmp_path, f"Is it A?{ask}", f"Is it B?{ask}\n") == plain
    assert [sample.messages[-1].text for sample in plain] == ["yes", "no"]
    assert [sample.messages[0].text for sample in plain] == [f"\nIs it A?{SHORT}", f"\nIs it B?{SHORT}"]


def test_mme_ids_that_are_numbers_are_findings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"jsonl:1: question_id: must be a string, got a number\n.*:2: question_id"):
        mme(tmp_path, f"Is it A?{SHORT}", f"Is it B?{SHORT}", question_id=7)
    with pytest.raises(ValueError, match=r"question_id: the path must not hold '\.\.'"):
        mme(tmp_path, f"Is it A?{SHORT}", question_id="../../OCR/0001.jpg")


@pytest.mark.parametrize("answer", [2, -1, 25, "1", 0.0, True, None])
def test_an_answer_beyond_the_options_is_a_bad_row(tmp_path: Path, answer: object) -> None:
    said = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}]
    rows = [{"id": "4", "image": "4.png", "conversations": said}, {"id": "5", "image": "5.png", "conversations": said}]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    problems = {"4": {"choices": ["x", "y"], "answer": answer}, "5": {"choices": ["x", "y"], "answer": 1}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    listing = read_listing(tmp_path, tmp_path, ReaderConfig(format="scienceqa"))
    assert [sample.messages[-1].text for sample in listing.samples] == ["B"]
    (finding,) = listing.problems
    assert finding.message == f"entry 0: answer must be the place of one of 2 options, from 0; got {answer!r}"


def test_a_line_that_is_no_json_is_one_finding(tmp_path: Path) -> None:
    image(tmp_path / "test2015" / "a.jpg")
    row = json.dumps({"question_id": 1, "image": "a.jpg", "text": f"Is it?{SHORT}"}).encode()
    null = json.dumps({"question_id": 2, "image": None, "text": "?"}).encode()
    path = tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl"
    path.write_bytes(b"\n".join([row, b"{", b"\xff", null, b"[]"]))
    listing = read_listing(tmp_path, tmp_path, ReaderConfig(format="vqav2"))
    assert [sample.id for sample in listing.samples] == ["1"]
    assert [finding.line_number for finding in listing.problems] == [2, 3, 4, 5]
    assert listing.problems[2].message == "image: must be a string, got null"


def test_what_import_writes_without_a_root_is_found_by_check(tmp_path: Path, monkeypatch, capsys) -> None:
    """As README has it: clips in a folder, the manifest beside it."""
    for name in ("a", "sub/b"):
        (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "media" / f"{name}.mp4", np.zeros((5, 16, 16), np.uint8))
        write_audio(tmp_path / "media" / f"{name}.wav", np.full(3_200, 0.1))
        (tmp_path / "media" / f"{name}.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "import", "clips", "media", "--out", "train.jsonl"]) == 0
    assert main(["data", "check", "train.jsonl", "--open"]) == 0
    samples = read_manifest("train.jsonl", ".")
    assert {part.path for sample in samples for part in sample.media} == {
        f"media/{name}.{suffix}" for name in ("a", "sub/b") for suffix in ("mp4", "wav")
    }
    assert main(["data", "import", "clips", "media", "--out", "media/inside.jsonl"]) == 0
    assert main(["data", "check", "media/inside.jsonl"]) == 0
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    assert main(["data", "import", "clips", "media", "--out", "elsewhere/x.jsonl"]) == 0
    assert "media paths are relative to media: give --root" in capsys.readouterr().out
    assert main(["data", "check", "elsewhere/x.jsonl", "--root", "media"]) == 0


def test_ids_of_questions_never_collide(tmp_path: Path, capsys) -> None:
    image(tmp_path / "test2015" / "a.jpg")
    rows = [{"question_id": name, "image": "a.jpg", "text": f"Is it?{SHORT}"} for name in ("7", "7#2", "7", "8")]
    source = lines(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", *rows)
    samples, shown = imported("vqav2", source, tmp_path, capsys, 1)
    assert [sample.id for sample in samples] == ["7", "7#2", "8"]
    assert ":3: the id '7#2' is needed for a second sample '7', but it is taken" in shown
