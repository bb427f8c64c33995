"""What is handed in has the form that the servers' own scripts write."""

import io
import json
import zipfile
from xml.etree import ElementTree

import openpyxl
import pytest

from mllm.evaluation.scorers.submissions import SUBMISSIONS, Answer
from mllm.evaluation.scorers.xlsx import MAIN, xlsx_of


def content(task: str, *answers: Answer, all_ids: tuple[int, ...] = ()) -> object:
    return json.loads(SUBMISSIONS[task].make(answers, all_ids))


def cells(file: bytes) -> list[list[str | None]]:
    with zipfile.ZipFile(io.BytesIO(file)) as package:
        sheet = ElementTree.fromstring(package.read("xl/worksheets/sheet1.xml"))
    rows = sheet.iter(f"{{{MAIN}}}row")
    return [["".join(cell.itertext()) if len(cell) else None for cell in row] for row in rows]


def test_vqav2_answers_every_question_of_the_test_set() -> None:
    said = (Answer("3", "Two dogs.", {}), Answer("1", "The U.S.A.", {}))
    expected = [{"question_id": n, "answer": a} for n, a in ((1, "usa"), (2, ""), (3, "2 dogs"))]
    assert content("vqav2", *said, all_ids=(1, 2, 3)) == expected
    assert content("vqav2", *said) == [expected[2], expected[0]]
    with pytest.raises(ValueError, match="question 3 of VQAv2 is not among all 2"):
        content("vqav2", *said, all_ids=(1, 2))


def test_short_answers() -> None:
    assert content("vizwiz", Answer("x", "A Cat", {"image": "v.jpg"})) == [{"image": "v.jpg", "answer": "cat"}]
    assert content("gqa", Answer("07", "Yes.", {})) == [{"questionId": "07", "prediction": "yes"}]
    said = Answer("5", "1/8/93.", {"question_id": 5})
    assert content("docvqa", said) == [{"questionId": 5, "answer": "1/8/93."}]  # as it was said
    options = {"options": ["x", "y"]}
    open_one = Answer("test_Art_2", "it is 4", {"options": []})
    assert content("mmmu", Answer("test_Art_1", "(B)", options), open_one) == {
        "test_Art_1": "B",
        "test_Art_2": "it is 4",
    }


def test_mmbench_is_a_sheet_with_predictions() -> None:
    row = {"question": "1 < 2 &c?", "A": "x", "B": "y"}
    said = [Answer("7", "A\x07 =SUM", {"row": row, "index": 7}), Answer("8", "", {"row": row, "index": 1000007})]
    file = SUBMISSIONS["mmbench"].make(said, ())
    assert cells(file) == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        ["7", "1 < 2 &c?", "x", "y", None, None, "A_x0007_ =SUM"],
        ["1000007", "1 < 2 &c?", "x", "y", None, None, ""],
    ]
    assert file == SUBMISSIONS["mmbench"].make(said, ())
    known = SUBMISSIONS["mmbench"].make([Answer("7", "B", {"row": {**row, "answer": "A"}, "index": 7})], ())
    assert cells(known)[0][-1] == "answer"
    assert cells(known)[1][-2:] == ["B", "A"]


def test_the_sheet_opens_as_one() -> None:
    sheet = openpyxl.load_workbook(io.BytesIO(xlsx_of([["index", "a"], [7, " <b>\n"], [8, None]]))).active
    assert [[cell.value for cell in row] for row in sheet.iter_rows()] == [["index", "a"], [7, " <b>\n"], [8, None]]


def test_what_could_not_be_handed_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meta\.image is missing, which the server wants"):
        SUBMISSIONS["vizwiz"].check(Answer("x", "", {}))
    with pytest.raises(ValueError, match="the server wants other ids or facts"):
        SUBMISSIONS["vqav2"].check(Answer("5#2", "", {}))
